"""Names that say a role: Assistant, 助手, 客服, アシスタント, 상담원; User, 用户, Human, Q."""

from __future__ import annotations

from ..conversation import Role

_LABELS: dict[Role, str] = {
    "user": (
        "user human q question questioner customer client visitor guest prompter patient student usr asker prompt "
        "input 用户 使用者 用戶 用户端 人类 人類 问 問 提问 提問 提问者 问题 客户 客戶 顾客 顧客 买家 買家 访客 "
        "患者 学生 学员 网友 咨询者 来访者 ユーザー ユーザ 質問 質問者 お客様 人間 사용자 유저 질문 질문자 고객 "
        "고객님 인간"
    ),
    "assistant": (
        "assistant ai bot a answer answerer agent chatgpt gpt model chatbot support operator adviser advisor "
        "doctor teacher helper sys gemini claude deepseek copilot qwen kimi output response 助手 助理 智能助手 "
        "ai助手 助教 机器人 機器人 客服 人工客服 在线客服 智能客服 答 回答 回答者 回复 答复 卖家 賣家 商家 店家 "
        "坐席 顾问 顧問 医生 醫生 医師 老师 老師 咨询师 模型 小助手 文心一言 豆包 通义千问 アシスタント ボット "
        "担当者 オペレーター 先生 어시스턴트 도우미 봇 챗봇 답변 답변자 상담원 상담사 판매자"
    ),
    "system": "system 系统 系統 システム 시스템",
    "tool": "tool function observation 工具",
}
ROLE_OF_LABEL: dict[str, Role] = {label: role for role, labels in _LABELS.items() for label in labels.split()}


def role_of(name: str) -> Role | None:
    """The role that a speaker's name says, if it says one: `助手` and `Assistant (GPT)` do, `小明` and `Ann` do not."""
    label = name.strip().strip("*#[]【】<>《》()（） :：\u200e").casefold()
    if found := ROLE_OF_LABEL.get(label):
        return found
    bare = label.partition("(")[0].partition("（")[0].strip().rstrip("0123456789一二三 ")
    return ROLE_OF_LABEL.get(bare) if len(bare) > 1 or not bare.isascii() else None  # q7 is somebody

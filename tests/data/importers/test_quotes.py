"""What a mail quotes is not what its sender wrote."""

from __future__ import annotations

import pytest

from chatmill.data.importers.forums.quotes import own_words

HEADERS = {
    "zh": "发件人: 张三 <a@b.cn>\n发送时间: 2023年5月1日 21:11\n收件人: 李四\n主题: Hi",
    "zh-tw": "寄件者: 張三 <a@b.tw>\n寄件日期: 2023年5月1日\n收件者: 李四\n主旨: Hi",
    "ja": "差出人: 山田 <a@b.jp>\n送信日時: 2023年5月1日\n宛先: 鈴木\n件名: Hi",
    "ko": "보낸 사람: 김 <a@b.kr>\n보낸 날짜: 2023년 5월 1일\n받는 사람: 이\n제목: Hi",
    "de": "Von: Ann <a@b.de>\nGesendet: Montag, 1. Mai 2023 21:11\nAn: Bob\nBetreff: Hi",
    "en": "From: Ann <a@b.org>\nSent: Monday, May 1, 2023 9:11 PM\nTo: Bob\nSubject: Hi",
    "fi": "Lähettäjä: Ann <a@b.fi>\nLähetetty: 1.5.2023\nVastaanottaja: Bob\nAihe: Hi",
}
WROTE = {
    "en": "On Mon, May 1, 2023 at 9:11 PM Ann <a@b.org> wrote:",
    "en wrapped": "On Mon, May 1, 2023 at 9:11 PM Ann\n<a@b.org> wrote:",
    "de": "Am Mo., 1. Mai 2023 um 21:11 Uhr schrieb Ann <a@b.de>:",
    "fr": "Le lun. 1 mai 2023 à 21:11, Ann <a@b.fr> a écrit :",
    "es": "El lun, 1 may 2023 a las 21:11, Ann (<a@b.es>) escribió:",
    "pt": "Em seg., 1 de mai. de 2023 às 21:11, Ann <a@b.pt> escreveu:",
    "it": "Il giorno lun 1 mag 2023 alle ore 21:11 Ann <a@b.it> ha scritto:",
    "nl": "Op ma 1 mei 2023 om 21:11 schreef Ann <a@b.nl>:",
    "sv": "Den mån 1 maj 2023 kl 21:11 skrev Ann <a@b.se>:",
    "fi": "ma 1. toukok. 2023 klo 21.11 Ann (a@b.fi) kirjoitti:",
    "pl": "pon., 1 maj 2023 o 21:11 Ann <a@b.pl> napisał(a):",
    "ru": "пн, 1 мая 2023 г. в 21:11, Ann <a@b.ru>:",
    "zh": "张三 <a@163.com> 于2023年5月1日周一 21:11写道：",
    "163": '在 2023-05-01 21:11:00，"张三" <a@163.com> 写道：',
    "zh-tw": "張三 <a@b.tw> 於 2023年5月1日 週一 下午9:11寫道：",
    "ja": "2023年5月1日(月) 21:11 山田 <a@b.jp>:",
    "ko": "2023년 5월 1일 (월) 오후 9:11, 김 <a@b.kr>님이 작성:",
    "unknown": "1.5.2023, 21:11, Ann <a@b.xx> blurbelte:",
}


@pytest.mark.parametrize("language", WROTE)
def test_a_quote_with_its_introduction_is_cut_in_every_language(language: str) -> None:
    assert own_words(f"Fine.\n\n{WROTE[language]}\n\n> How are\n> you?\n") == "Fine."
    assert own_words(f"{WROTE[language]}\n> How are you?\n\nFine.\nAnd you?") == "Fine.\nAnd you?"
    assert own_words(f"{WROTE[language]}\n> How are you?\n\nFine.\n> And Bob?\n\nHe, too.") == "Fine.\n\nHe, too."


@pytest.mark.parametrize("language", ["en", "de", "fr", "zh", "163", "zh-tw", "ko", "sv"])
def test_what_stands_below_an_introduction_without_marks_is_quoted(language: str) -> None:
    assert own_words(f"不客气。\n\n{WROTE[language]}\n\n好的，谢谢！\n明天见") == "不客气。"


@pytest.mark.parametrize("language", HEADERS)
def test_a_block_of_headers_begins_a_quote(language: str) -> None:
    for rule in ("", "_" * 32 + "\n", "------------------ 原始邮件 ------------------\n", "-----Original Message-----\n"):
        assert own_words(f"Fine.\n\n{rule}{HEADERS[language]}\n\nHow are you?") == "Fine."


@pytest.mark.parametrize(
    "text",
    [
        "Dear Ann,\n\nthe list:\n- from: Helsinki\n- to: Oulu\n\nBob",
        "We meet on 1 May 2023 at 21:11:\n\nfirst the tea, then the cake.",
        "He wrote:\n\nnothing at all.",
        "时间：明天\n地点：东门\n\n不见不散",
        "写道：",
    ],
)
def test_own_words_with_colons_and_dates_stay(text: str) -> None:
    assert own_words(text) == text


def test_a_signature_is_cut() -> None:
    assert own_words("Fine.\r\n-- \r\nAnn\r\n") == "Fine."

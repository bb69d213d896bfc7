"""Phrases that programs leave in chats: deletion marks, refusals, a provider's identity and errors, bots, copied button labels.

Each pattern serves one rule of data/cleaning/clean.py (`drop_deleted`, `drop_refusals`, `drop_provider_identity`,
`drop_provider_errors`, `drop_bots`, `boilerplate`). These are English; the Chinese ones are in phrases_chinese.py.
"""

from __future__ import annotations

import re

DELETED = re.compile(
    r"\s*(\[(deleted|removed|message deleted|unavailable|deleted by user|removed by moderator)\]|<Media omitted>"
    r"|(image|video|audio|sticker|GIF|document|contact card) omitted"
    r"|(This|You deleted this) message( was deleted)?\.?|null)\s*",
    re.I,
)
REFUSAL = re.compile(
    r"^(I('m| am)( really| very)? sorry|Sorry|I apologi[sz]e|Unfortunately|My apologies),? (but )?(as an? [\w ]{2,30}, )?I "
    r"(can('|’|no)?t|am (not able|unable)|('m|’m) (not able|unable)|won't|will not|do(n't| not) feel comfortable) (to )?"
    r"(help|assist|fulfil|comply|provide|generate|create|discuss|engage)\b"
    r"|\bI (can('|’|no)t|am unable to|am not able to|won't) (assist|help you) with (that|this|your)( specific)? ?"
    r"(request|question)?"
    r"|\bI (can('|’|no)t|am unable to|won't|will not) (fulfil+|comply with|complete) (that|this|your) request\b"
    r"|\b(it|that|this) (is|would be) against my (programming|guidelines|content policy|use case policy)\b",
    re.I | re.M,
)
PROVIDER_IDENTITY = re.compile(
    r"\bas an? (AI|artificial intelligence|(large )?language model)( language)?( model| assistant)?\b(?= ?[,.]| I\b)"
    r"|\bI('m|’m| am) (only |just |actually )?an? (AI|artificial intelligence|(large )?language model)\b"
    r"|\bI('m|’m| am| was| have been)( \w+){0,8} (trained|developed|created|made|built) by (the team at )?"
    r"(OpenAI|Anthropic|Google|Meta|Mistral|DeepSeek|Alibaba|Microsoft|xAI|Cohere|LMSYS|LAION)\b"
    r"|\bI('m|’m| am) (ChatGPT|Claude|Bard|Gemini|Copilot|Bing|Grok|Qwen|Llama|DeepSeek|Vicuna|Open ?Assistant|GPT-?\d)\b"
    r"|\bmy (knowledge cut-?off|training data)\b|\bI (do not|don['’]t) have personal (feelings|opinions|emotions|beliefs)\b",
    re.I,
)
PROVIDER_ERROR = re.compile(
    r"\s*!?(Too many requests in (1|one) hour\. Try again later\.?"
    r"|(You('ve| have) reached|Rate limit reached for).{0,200}limit.{0,200}"
    r"|Something went wrong\. If this issue persists.{0,200}|There was an error generating a response.{0,60}|Network error\.?"
    r"|The server (is currently overloaded|had an error).{0,300}|An error occurred\. .{0,300}help\.openai\.com.{0,60}"
    r"|This content may violate our (content policy|usage policies).{0,300}|Internal server error\.?|\$NETWORK ERROR.{0,200}"
    r"|The message you submitted was too long.{0,200})\s*",
    re.I,
)
BOT = re.compile(
    r"\bI( a|')m a (ro)?bot,? (and this action was performed automatically|[*_(\[]*(bl?eep|beep))"
    r"|^[ \t*_^(]*(beep|bl?eep)[\s,-]*(boop|bloop)"
    r"|\b(this is an automated (message|reply|response)|this message was sent automatically)\b"
    r"|\^?\(?(contact|pm|message) (the )?(creator|developer|operator) of this bot\b",
    re.I | re.M,
)
BOT_NAMES = frozenset(
    ("automoderator", "autotldr", "carl-bot", "clyde", "dependabot[bot]", "dyno", "github-actions[bot]", "groovy", "haikusbot",
     "imgurtranscriber", "mee6", "mudae", "nightbot", "remindmebot", "rythm", "slackbot", "sneakpeekbot", "streamelements",
     "streamlabs", "tatsu", "vredditdownloader", "wikisummarizerbot", "wikitextbot")
)  # fmt: skip
# Lines that a web page puts around the text. Each is removed if it is alone on its line.
BOILERPLATE = (
    r"(?i)copy code",
    r"(?i)regenerate( response)?",
    r"(?i)continue generating",
    r"(?i)stop generating",
    r"(?i)was this (response|answer|article) (better or worse|helpful)\?.*",
    r"(?i)chatgpt can make mistakes\. .{0,80}",
    r"(?i)(chatgpt|claude|gemini) said:",
    r"(?i)you said:",
    r"\d{1,3} ?/ ?\d{1,3}",
    r"(?i)sent from my (iphone|ipad|android.*|mobile.*|samsung.*|galaxy.*)",
    r"(?i)get outlook for (ios|android)(<.*>)?",
    r"(?i)(share|report|give award|save|reply|permalink)( (share|report|give award|save|reply|permalink))+",
    r"(?i)edit\s*\d?:? ?(wow,? )?thanks? (you )?(so much )?for the (gold|silver|platinum|awards?)\b.*",
    r"(?i)this (site|website) uses cookies\b.*",
    r"(?i)(subscribe|sign up) (to|for) our newsletter\b.*",
)

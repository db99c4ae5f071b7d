"""Recognition of refusals, such as "I'm sorry, but I can't help with that", in six languages.

A caption can begin like a refusal, for example if it quotes a sign. Therefore, an apology is not sufficient: it must be
followed by what the model cannot do, or by a missing image. All expressions take linear time.
"""

import re

MAX_CHARACTERS = 300  # at the beginning of an answer, in which a refusal is expected

_IMAGE = r"(?:image|picture|photo|photograph|attachment|file|link|url)s?\b"
_OBJECT = rf"(?:{_IMAGE}|(?:caption|description|detail|information|identit|request|question|prompt|content)\w*)"
_INABILITY = (
    r"(?:can ?not|can't|could not|couldn't|will not|won't|do not|don't|did not|didn't|will not be able to|"
    r"won't be able to|must decline to|(?:am|'m) (?:\w+ly |still |also )?(?:unable|not (?:able|allowed|permitted|"
    r"programmed|designed|trained|going|comfortable|in a position))(?: to)?)"
)
_CLEAR_VERB = (
    r"(?:describ(?:e|ing)|identify(?:ing)?|assist|comply|analy[sz]e|interpret|recogni[sz]e|speculate|fulfil+|caption|"
    r"help (?:you|with|identify|describe)|discuss|engage in|do (?:that|this|so))\b"
)
_OTHER_VERB = (  # with an object that occurs in refusals
    r"(?:actually |directly |be able to )?(?:view|read|open|access|find|display|process|load|answer|provide|give|"
    r"offer|create|write|generate|share|make|continue|complete|have|handle|respond to|produce|detect|look at)"
)
_AFTER_MISSING = (  # what follows "there is no image attached", but not "there is no image attached to the wall"
    r"(?:\s*(?:[.;:!?]|$)|,? (?:so|and|but|please) \w+\b|\s+for me\b|\s+(?:to|in|with) (?:your|this|the|our) "
    r"(?:message|conversation|request|prompt|chat|question|query|input|text)\b|"
    r"\s+(?:to|for me to) (?:describe|caption|analy[sz]e|provide|see|view)\b)"
)
_PROVIDED = r"(?:attached|provided|uploaded|included|supplied|available|found|received|detected|visible|here|above)"

_ENGLISH_APOLOGY = (
    r"(?:(?:(?:i am|i'm|we are|we're) (?:so |very |really |truly |terribly )?(?:sorry|afraid)|sorry|(?:my )?apologies|"
    r"i (?:sincerely )?apologi[sz]e|unfortunately|regrettably|hello|hi)(?: for (?:the|any) \w+)?[\s,.;:!]*"
    r"(?:(?:but|however|that)\b[\s,]*)?)"
)
_ENGLISH = (
    rf"i ?{_INABILITY} (?:\w+ly )?(?:{_CLEAR_VERB}|{_OTHER_VERB} (?:[\w'-]+ ){{0,5}}?{_OBJECT}|"
    rf"(?:actually |directly |be able to )?see (?:(?:the|an?|any|your|this|that|actual|attached) ){{0,2}}{_OBJECT})",
    r"i (?:can ?not|can't)[.!]*$",
    r"i (?:do not|don't) (?:currently )?have (?:the |any |direct )?(?:ability|capability|access|permission)\b",
    r"i(?: would|'d) (?:prefer|rather) not|i (?:have to|must) decline",
    r"(?:i am|i'm) (?:just |only )?an? (?:\w+[ -])?(?:ai|artificial intelligence|language model)\b",
    r"as an? (?:\w+[ -]){0,3}(?:ai|artificial intelligence|model|assistant)\b[^.]{0,60},? i\b",
    rf"(?:there (?:is|are|was|were|doesn't|does not)(?: seem to be| appear to be)? ?(?:no|any|an)|i see no|no) {_IMAGE}"
    rf"(?: (?:was|is|were|are|has been|have been))? {_PROVIDED}{_AFTER_MISSING}",
    rf"(?:it (?:seems|looks|appears)(?: like| that)? )?(?:the|your|this|that) {_IMAGE}(?: you \w+)? (?:could not|"
    r"couldn't|can ?not|can't|did not|didn't|does not|doesn't|failed to|is not|isn't|was not|wasn't)(?: seem to)? "
    r"(?:be )?(?:load|display|open|view|process|upload|attach|provid|available|accessible|found|visible)(?:ed)?"
    r"(?=\s*(?:[.,;:!?]|$)|\s(?:for me|properly|correctly|successfully|here|to me|in|on|and|so)\b)",
    rf"(?:it (?:seems|looks|appears)(?: like| that)? )(?:you (?:did not|didn't|forgot|have not|haven't)|no {_IMAGE}|"
    rf"there (?:is|was|are)(?:n't| no| not)(?: an| any)? ?{_IMAGE})",
    r"(?:please|(?:could|can|would) you(?: please)?) (?:re-?upload|provide|upload|share|send|attach)(?: me)?(?: with)? "
    rf"(?:an?|the|your|another) (?:\w+ )?{_IMAGE}\b",
    r"(?:this|that|the|your) (?:request|content|prompt|question) (?:violates|goes against|is against|is not something|"
    r"cannot be)",
    r"it(?: is|'s) (?:against|not (?:possible|appropriate) (?:for me )?to (?:describe|identify|provide))",
)
_GERMAN_VERB = (
    r"(?:sehen|ansehen|beschreiben|erkennen|identifizieren|helfen|analysieren|anzeigen|bereitstellen|erstellen)"
)
_GERMAN = (
    rf"ich (?:kann|darf|konnte) [^.]{{0,80}}?\b(?:nicht|nichts|keine?[nrms]?)\b[^.]{{0,60}}?\b{_GERMAN_VERB}\b",
    rf"kann ich [^.]{{0,80}}?\b(?:nicht|nichts|keine?[nrms]?)\b[^.]{{0,60}}?\b{_GERMAN_VERB}\b",
    r"(?:ich bin (?:leider )?nicht in der lage|bin ich nicht in der lage)",
    r"(?:ich (?:sehe|habe)|sehe ich|habe ich) (?:leider |hier )?(?:kein bild|kein foto|keinen zugriff)",
    r"als (?:eine? )?(?:ki|künstliche intelligenz)\b(?:-\w+)?,? (?:kann|habe|bin|darf) ich",
    r"(?:es (?:wurde|ist)|ich habe) (?:leider )?kein (?:bild|foto) (?:angehängt|bereitgestellt|hochgeladen|vorhanden)",
    r"bitte (?:laden|lade|stellen|senden|sende|teilen|geben) (?:sie )?[^.]{0,30}\b(?:bild|foto)\b",
)
_GERMAN_APOLOGY = (
    r"(?:(?:es tut mir (?:sehr )?leid|tut mir leid|entschuldigung|leider)[\s,.;:!]*(?:(?:aber|doch|dass)\s+)?)"
)
_FRENCH = (
    r"je (?:ne )?(?:peux|puis|pourrai|suis|parviens|saurais)(?: malheureusement)? pas\b[^.]{0,40}?\b(?:voir|décrire|"
    r"identifier|fournir|aider|répondre|analyser|accéder|afficher|traiter|reconnaître|générer|visualiser)",
    r"je ne vois (?:pas|aucune)\b[^.]{0,12}\b(?:image|photo)",
    r"je n'ai (?:pas|malheureusement pas) (?:accès|la capacité|reçu)",
    r"en tant qu(?:'(?:ia|intelligence artificielle|assistant)|e modèle)\b[^.]{0,60}\bje\b",
    r"(?:aucune (?:image|photo) n'a été|il n'y a (?:pas d'|aucune )(?:image|photo) (?:jointe|fournie))",
    r"veuillez (?:fournir|télécharger|partager|joindre|envoyer)\b[^.]{0,20}\b(?:image|photo)",
)
_FRENCH_APOLOGY = r"(?:(?:(?:je suis )?(?:vraiment )?désolée?|malheureusement|pardon)[\s,.;:!]*(?:mais\s+)?)"
_SPANISH = (
    r"no (?:puedo|soy capaz de|me es posible)\b[^.]{0,30}?\b(?:ver|describir|identificar|ayudar\w*|proporcionar|"
    r"analizar|acceder|procesar|responder|generar|mostrar|cumplir)\b",
    r"no (?:veo|hay|tengo acceso a) (?:una |ninguna |la )?(?:imagen|foto)(?: adjunta| proporcionada)?\s*(?:[.,]|$)",
    r"no se (?:ha )?(?:proporcion|adjunt)(?:ado|ó) ninguna (?:imagen|foto)",
    r"como (?:una? )?(?:modelo de lenguaje|ia|inteligencia artificial|asistente)\b[^.]{0,60}\bno\b",
    r"por favor,? (?:proporcion|sub|compart|env[íi]|adjunt)\w+ (?:una|la|tu|su) (?:\w+ )?(?:imagen|foto)",
)
_SPANISH_APOLOGY = r"(?:(?:lo (?:siento|lamento)(?: mucho)?|disculpas?|perdón|lamentablemente)[\s,.;:!]*(?:pero\s+)?)"
_CHINESE_VERB = "查看|看到|描述|识别|識別|辨认|提供|帮|幫|协助|協助|访问|處理|处理|分析|回答|满足|滿足|图|圖|照片"
_CHINESE_APOLOGY = "(?:(?:很|非常|十分)?(?:抱歉|对不起|對不起|不好意思|遗憾)[，,。！!\\s]*(?:但是?)?)"
_CHINESE = (
    rf"{_CHINESE_APOLOGY}?我(?:目前|暂时|现在|並|并)?(?:无法|無法|不能|没办法|看不到|没有看到|没有收到)[^。]{{0,20}}?(?:{_CHINESE_VERB})",
    rf"{_CHINESE_APOLOGY}(?:无法|無法|不能)[^。]{{0,20}}?(?:{_CHINESE_VERB})",
    "(?:作为|作為|我是)(?:一个|一個|一名|一款)?\\s*(?:ai|人工智能|人工智慧|大型|语言|語言)[^。]{0,12}[，,][^。]{0,10}(?:无法|無法|不能|没有)",
    "[请請](?:您|你)?(?:重新)?(?:上传|上傳|提供|发送|發送|分享)[^。]{0,10}(?:图|圖|照片)",
    "(?:您|你)?(?:没有|沒有|未|尚未)(?:提供|上传|上傳|附上)[^。]{0,6}(?:图|圖|照片)",
)
_JAPANESE_APOLOGY = "(?:(?:大変)?(?:申し訳(?:あり|ござい)ません|すみません|ごめんなさい|残念ながら)[がけど、。,\\s]*)"
_JAPANESE_END = "(?:できません|できかねます|いたしかねます|見えません|ありません|わかりません)"
_JAPANESE = (
    rf"{_JAPANESE_APOLOGY}[^。]{{0,50}}?{_JAPANESE_END}",
    "[^。]{0,30}?(?:特定|識別|説明|お答え|お手伝い|提供|表示|確認|閲覧|対応|生成|分析|処理|見る)(?:する)?(?:こと)?[はがも]?できません",
    "[^。]{0,10}?画像が(?:添付|提供|アップロード|表示)されていません",
    "(?:私は)?ai(?:アシスタント|言語モデル|モデル)?(?:として|なので|ですので|であり)[^。]{0,60}ません",
)


def _join(apology: str, expressions: tuple[str, ...]) -> str:
    return rf"{apology}{{0,3}}(?:{'|'.join(expressions)})"


_REFUSAL = re.compile(
    "|".join(
        [
            _join(_ENGLISH_APOLOGY, _ENGLISH),
            rf"{_ENGLISH_APOLOGY}{{1,3}}$",
            _join(_GERMAN_APOLOGY, _GERMAN),
            _join(_FRENCH_APOLOGY, _FRENCH),
            _join(_SPANISH_APOLOGY, _SPANISH),
            *_CHINESE,
            *_JAPANESE,
        ]
    ),
    re.IGNORECASE,
)


def is_refusal(text: str) -> bool:
    """Return True if a text begins with a refusal to write a caption."""
    beginning = " ".join(text[:MAX_CHARACTERS].replace("’", "'").split())
    return _REFUSAL.match(beginning) is not None

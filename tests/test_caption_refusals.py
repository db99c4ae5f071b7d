"""Tests of the recognition of refusals: answers of models, and captions that begin in a similar way."""

import time

import pytest

from llm2clip.caption.answers import clean_answer, is_refusal

REFUSALS = [
    "I’m sorry, but I can't help with that.",
    "I’m sorry, but I can’t assist with that request.",
    "I am sorry, but I am unable to process this image.",
    "Sorry, I can't describe this image.",
    "Sorry.",
    "I'm sorry for the confusion, but there is no image attached to your message.",
    "Apologies, but I cannot see the picture you are referring to.",
    "My apologies, I don't have the ability to view images.",
    "I apologize for any confusion, but I cannot provide a description of the people in it.",
    "I can't.",
    "I cannot identify people.",
    "I can't provide details about the individual.",
    "I don't see any image in this conversation.",
    "I am unable to see an image above.",
    "I'm currently unable to view or describe images.",
    "I'm not comfortable describing this content.",
    "I won't be able to describe this photo.",
    "I do not have access to the image.",
    "I must decline to describe this image.",
    "I'm afraid I can't do that.",
    "As an AI language model, I see a dog.",
    "As a large language model, I cannot view images.",
    "I'm an AI assistant and cannot view photos.",
    "There is no image here to provide a caption for.",
    "No image was provided.",
    "There is no image provided, so I cannot write a caption.",
    "It seems there is no image attached to your message.",
    "It looks like you haven't uploaded an image yet.",
    "The image could not be loaded.",
    "Please provide the image so that I can write a caption.",
    "Could you please upload the image again?",
    "This request violates the content policy.",
    "Es tut mir leid, aber ich kann dieses Bild nicht beschreiben.",
    "Leider kann ich keine Bilder sehen.",
    "Ich kann das Bild nicht sehen.",
    "Als KI-Sprachmodell kann ich keine Personen identifizieren.",
    "Bitte laden Sie ein Bild hoch.",
    "Es tut mir leid, ich sehe kein Bild.",
    "Ich kann auf dem Bild leider nichts erkennen, nicht einmal Umrisse.",
    "Je suis désolé, mais je ne peux pas vous aider.",
    "Désolée, je ne vois pas d'image.",
    "En tant que modèle de langage, je ne peux pas voir les images.",
    "Je ne peux pas identifier les personnes sur cette photo.",
    "Lo siento, pero no puedo describir esta imagen.",
    "No puedo ayudarte con eso.",
    "No veo ninguna imagen.",
    "Como modelo de lenguaje, no puedo ver imágenes.",
    "很抱歉，我无法查看图片。",
    "对不起，我不能识别图中的人物。",
    "我无法看到您所说的图像。",
    "作为一个人工智能语言模型，我无法描述图片。",
    "请上传图片。",
    "Es wurde kein Bild hochgeladen.",
    "抱歉，无法识别这张图片。",
    "申し訳ありませんが、この画像を説明することはできません。",
    "画像を見ることができません。",
    "画像が添付されていません。",
]
CAPTIONS = [
    "There are no images attached to the wall.",
    "There is no picture on the wall behind the sofa.",
    "No images are attached to the board next to the door.",
    "The photo does not display any people, only trees.",
    "The image does not display any text.",
    "I don't see any people in this image, only an empty street.",
    "Sorry sign hangs on a door.",
    "Sorry, we're closed, says a sign in a shop window.",
    "I'm sorry, reads a card next to a bunch of flowers.",
    "Sorry but not sorry is printed on a boy's shirt.",
    "Unfortunately dressed for the rain, two hikers run across a meadow.",
    "I can't believe it is not butter, says a poster.",
    "I can't help falling in love, says a banner at a wedding.",
    "I can't see the forest for the trees is written on a map.",
    "I do not have a dream, says a graffito on a brick wall.",
    "I am unable to stop, reads the sticker on the back of a truck.",
    "I'm not able to fly, says a penguin in a comic.",
    "As an AI robot serves coffee, three guests take photos.",
    "As an artificial Christmas tree glows, a cat sleeps under it.",
    "Please share the road, says a yellow sign beside a cyclist.",
    "Please provide your own cups, says a note on a coffee machine.",
    "Can you see the stars, asks a billboard above a street.",
    "The picture was not hung straight, and a man corrects it.",
    "It looks like a storm is coming over the wheat field.",
    "We cannot see the face of the girl with the white T-shirt.",
    "Ich kann nicht mehr, steht auf einem T-Shirt.",
    "Leider geschlossen, steht auf einem Schild an der Tür.",
    "Als Kind verkleidet sich ein Mann auf einer Feier.",
    "Bitte nicht stören, steht auf einem Schild.",
    "Je ne regrette rien, dit une affiche sur un mur.",
    "Désolé, fermé, dit une pancarte sur la porte.",
    "No puedo vivir sin ti está escrito en una pared.",
    "No hay nadie en la playa.",
    "Lo siento, cerrado, dice un cartel en la puerta.",
    "无法辨认的文字写在墙上。",
    "对不起的牌子挂在门上。",
    "我爱你写在沙滩上。",
    "申し訳なさそうな顔の犬がソファに座っている。",
    "すみませんと書かれた看板が立っている。",
]


@pytest.mark.parametrize("text", REFUSALS)
def test_refusals_are_recognised(text: str) -> None:
    answer = clean_answer(text, truncated=False)
    assert answer.text is None and answer.error is not None and answer.error.startswith("refusal")


@pytest.mark.parametrize("text", CAPTIONS)
def test_captions_that_begin_like_refusals_are_accepted(text: str) -> None:
    assert clean_answer(text, truncated=False).text == text


@pytest.mark.parametrize(
    "part", ["sorry ", "i can't ", "i can't see the ", "there is no ", "ich kann ", "je ne peux pas ", "我无法", "画像"]
)
def test_hostile_texts_take_linear_time(part: str) -> None:
    start = time.process_time()
    assert not is_refusal(part * 20_000 + "x")
    assert time.process_time() - start < 0.5

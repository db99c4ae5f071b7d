"""Caption keys and deduplication of captions."""

from llm2clip.data.texts import deduplicate_captions, make_caption_key


def test_caption_key_is_the_start_of_sha256() -> None:
    assert make_caption_key("a") == make_caption_key("a") != make_caption_key("A")
    # Stores on disk contain these keys.
    assert make_caption_key("a").hex() == "ca978112ca1bbdcafac231b39a23dc4d"


def test_unique_captions_keeps_the_first_of_each() -> None:
    assert deduplicate_captions(["b", "a", "b"]) == ["b", "a"]

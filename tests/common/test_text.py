"""Tokenizers and chat templates of real model files."""

import json
from pathlib import Path

from common.model_files import DEFAULT_MODEL
from common.protocol import ChatMessage, PipelineError, TokenLogprobs
from common.text import TextModel, load_text_model

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

CORPUS = ["the quick brown fox jumps over the lazy dog", "naïve café 漢字 👩‍👩‍👧", "1 + 1 = 2"] * 3


@pytest.fixture(scope="module")
def smollm2() -> TextModel:
    return load_text_model(DEFAULT_MODEL)


def user(content: str) -> ChatMessage:
    return ChatMessage(role="user", content=content)


def folder_of_byte_level_model(folder: Path) -> Path:
    """A Hugging Face folder whose tokenizer puts a BOS before any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        show_progress=False,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "special": True},
        "chat_template": "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
        "{{ eos_token }}{% endfor %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_smollm2_gets_no_system_prompt_unless_the_client_sends_one(smollm2: TextModel) -> None:
    """With the template's own default it answers "L'Étoile, la Marseillaise, la femme…"."""
    assert smollm2.name == "SmolLM2-135M-Instruct"
    question = "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    assert smollm2.render_chat([user("What?")]) == question
    system = ChatMessage(role="system", content="Be brief.")
    with_system = "<|im_start|>system\nBe brief.<|im_end|>\n" + question
    assert smollm2.render_chat([system, user("What?")]) == with_system


def test_a_rendered_chat_is_made_of_control_tokens(smollm2: TextModel) -> None:
    ids = smollm2.encode(smollm2.render_chat([user("What is the capital of France?")]))
    assert ids == [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]


def test_no_bos_where_the_model_wants_none(smollm2: TextModel) -> None:
    assert smollm2.encode("Hello") == [19556]
    assert smollm2.encode("") == []


def test_exactly_one_bos_where_the_model_wants_one(tmp_path: Path) -> None:
    """The template writes a BOS of its own, which must not become the second one."""
    model = load_text_model(str(folder_of_byte_level_model(tmp_path)))
    bos, eos = model.encode("<s></s>")
    assert model.encode("the fox")[0] == bos
    assert model.encode("") == [bos]
    chat = model.encode(model.render_chat([user("the fox")]))
    assert (chat.count(bos), chat[0], chat[-1]) == (1, bos, eos)


def test_hugging_face_token_bytes(tmp_path: Path) -> None:
    model = load_text_model(str(folder_of_byte_level_model(tmp_path)))
    text = "naïve\n 漢字 <think>"
    ids = model.encode(text)
    assert b"".join(map(model.tokenizer.token_bytes, ids)).decode() == text
    assert model.tokenizer.token_bytes(ids[0]) == b""  # the BOS


def test_chat_template_file_of_a_hugging_face_folder_wins(tmp_path: Path) -> None:
    folder = folder_of_byte_level_model(tmp_path)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    assert load_text_model(str(folder)).render_chat([user("hi")]) == "hi!"


def test_template_override(tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text(
        "{% for m in messages %}\n    {%- if loop.index > 1 %}{% break %}{% endif %}\n"
        "{{ m | tojson }} {{ strftime_now('%%') }}\n{% endfor %}"
    )
    model = load_text_model(DEFAULT_MODEL, file)
    expected = '{"role": "user", "content": "<é>"} %\n'
    assert model.render_chat([user("<é>"), user("second")]) == expected


def test_template_with_marks_for_training(tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text(
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}.{% endfor %}"
    )
    assert load_text_model(DEFAULT_MODEL, file).render_chat([user("a"), user("b")]) == "a.b."


def test_template_that_refuses_the_messages(tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(PipelineError, match="roles must alternate") as caught:
        load_text_model(DEFAULT_MODEL, file).render_chat([user("hi")])
    assert (caught.value.info.kind, caught.value.info.param) == ("invalid_request", "messages")


def test_template_cannot_leave_the_sandbox(tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}{{ messages.append(1) }}")
    with pytest.raises(PipelineError, match="unsafe"):
        load_text_model(DEFAULT_MODEL, file).render_chat([user("hi")])


def test_bad_template_file_is_refused_at_start(tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text("{% if %}")
    with pytest.raises(ValueError, match=r"chat template of .*template\.jinja is invalid"):
        load_text_model(DEFAULT_MODEL, file)


def test_model_without_a_chat_template(tmp_path: Path) -> None:
    folder = folder_of_byte_level_model(tmp_path)
    (folder / "tokenizer_config.json").unlink()
    model = load_text_model(str(folder))
    with pytest.raises(PipelineError, match="has no chat template; use /v1/completions"):
        model.render_chat([user("hi")])


def test_missing_models_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json"):
        load_text_model(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="absent"):
        load_text_model(str(tmp_path / "absent.gguf"))


def test_broken_models_are_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"cannot read .*tokenizer\.json"):
        load_text_model(str(tmp_path))
    gguf = tmp_path / "broken.gguf"
    gguf.write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(ValueError, match=r"broken\.gguf"):
        load_text_model(str(gguf))


def test_logprobs_carry_the_bytes_of_partial_characters(smollm2: TextModel) -> None:
    ids = smollm2.encode("🥐")
    assert len(ids) > 1, "the test needs a character of several tokens"
    positions = smollm2.logprobs(ids, [TokenLogprobs(-0.5, [(ids[0], -0.5)]) for _ in ids])
    data = [byte for position in positions for byte in position.chosen.bytes]
    assert bytes(data).decode() == "🥐"
    assert positions[0].top == [positions[0].chosen]


def test_token_ids_that_the_model_does_not_have(smollm2: TextModel) -> None:
    smollm2.check_token_ids([0, 49151], "prompt")
    for bad in (-1, 49152):
        with pytest.raises(PipelineError, match=r"'prompt': token id .* is not in 0\.\.49151"):
            smollm2.check_token_ids([0, bad], "prompt")

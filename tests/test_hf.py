"""Exported folders in transformers: an EBT by registration, a Transformer++ as a Llama; logits are our engine's."""

import subprocess
import sys

import pytest
import torch

import ebt_megatron as ebt
from ebt_megatron.parallel import setup
from tests import shared_models

transformers = pytest.importorskip("transformers")
TEXTS = ["Document 3 says word3 word6", "Document 5", "says word5 word10 word15 word20 word25"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    runs = shared_models.text_runs(tmp_path_factory.mktemp("runs"))
    yield shared_models.exported(runs, tmp_path_factory.mktemp("folders"))
    setup.shutdown()


def opened(folder):
    import ebt_megatron.hf  # noqa: F401, registers the architecture

    model = transformers.AutoModelForCausalLM.from_pretrained(str(folder))
    return model, transformers.AutoTokenizer.from_pretrained(str(folder)), ebt.load(folder)


@pytest.mark.parametrize("name", ["ebt", "noisy", "transformer"])
def test_logits_are_what_our_engine_scores_by(name, folders):
    model, tokenizer, ours = opened(folders[name])
    assert type(model).__name__ == ("LlamaForCausalLM" if name == "transformer" else "EBTForCausalLM")
    text = TEXTS[0] if name != "transformer" else "Document 3"  # the window: a Llama sees further than it was trained
    tokens = tokenizer(text, return_tensors="pt")
    assert tokens.input_ids[0].tolist() == ours.encode(text)
    with torch.no_grad():
        logits = model(**tokens).logits[0].log_softmax(-1)
    if name == "noisy":  # noise is fixed by the seed and the place in a text
        found = next(iter(ours.stream(text, max_tokens=1, temperature=0)))
        assert float(logits[-1, found.token]) == pytest.approx(found.log_p, abs=1e-4)
        return
    wanted = ours.score(text).log_p
    there = logits[:-1].gather(1, tokens.input_ids[0, 1:, None])[:, 0].tolist()
    assert there == pytest.approx(wanted, abs=1e-4)


def test_steps_are_said_to_from_pretrained(folders):
    import ebt_megatron.hf  # noqa: F401

    model = transformers.AutoModelForCausalLM.from_pretrained(str(folders["ebt"]), thinking={"steps": 7})
    ours = ebt.load(folders["ebt"])
    tokens = torch.tensor([ours.encode(TEXTS[0])])
    logits = model(tokens).logits[0, :-1].gather(1, tokens[0, 1:, None])[:, 0].tolist()
    assert logits == pytest.approx(ours.score(TEXTS[0], steps=7).log_p, abs=1e-4)
    assert logits != pytest.approx(ours.score(TEXTS[0], steps=1).log_p, abs=1e-4)


@pytest.mark.parametrize("name", ["ebt", "transformer"])
def test_the_pipeline_generates_what_we_do_with_padding_and_without(name, folders):
    model, tokenizer, ours = opened(folders[name])
    short = [text for text in TEXTS if len(ours.encode(text)) <= 6]
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    several = pipe(short, max_new_tokens=4, do_sample=False, batch_size=2, return_full_text=False)
    for text, (made,) in zip(short, several, strict=True):
        assert made["generated_text"] == ours.generate(text, max_tokens=4, temperature=0).text


@pytest.mark.parametrize("name", ["ebt", "noisy"])
@pytest.mark.parametrize("how", [{"do_sample": False}, {"num_beams": 3}])
def test_a_token_is_read_once_and_nothing_is_other_than_without_what_is_kept(name, how, folders, monkeypatch):
    model, tokenizer, _ = opened(folders[name])
    given = tokenizer(TEXTS[:2], return_tensors="pt", padding=True)
    read, reader = [], model.predictor.reader
    one = reader.read

    def counted(context, rows, positions, tokens):
        read.append(len(rows))
        return one(context, rows, positions, tokens)

    monkeypatch.setattr(reader, "read", counted)
    made = {}
    for kept in (True, False):
        read.clear()
        made[kept] = model.generate(**given, max_new_tokens=12, use_cache=kept, **how).tolist()  # past the window
        if kept:
            prompts, beams = int(given.attention_mask.sum()), how.get("num_beams", 1)
            assert read == [prompts * beams, *[2 * beams] * 11]
    assert made[True] == made[False]


def test_perplexity_and_its_mask(folders):
    model, tokenizer, ours = opened(folders["ebt"])
    tokens = tokenizer(TEXTS[:2], return_tensors="pt", padding=True)
    labels = tokens.input_ids.masked_fill(tokens.attention_mask == 0, -100)
    out = model(**tokens, labels=labels)
    every = [p for text in TEXTS[:2] for p in ours.score(text).log_p]
    assert float(out.loss) == pytest.approx(-sum(every) / len(every), abs=1e-4)


def test_lm_evals_own_model_of_transformers_scores_and_continues_as_we_do(folders):
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    instance = pytest.importorskip("lm_eval.api.instance").Instance
    model, tokenizer, ours = opened(folders["ebt"])
    harness = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, device="cpu")
    asked = [("Document 3 says", " word3"), ("Document 5", " says word5")]
    found = harness.loglikelihood([instance("loglikelihood", {}, pair, i) for i, pair in enumerate(asked)])
    for (context, continuation), (log_p, _) in zip(asked, found, strict=True):
        count = len(ours.encode(context + continuation)) - len(ours.encode(context))
        assert log_p == pytest.approx(sum(ours.score(context + continuation).log_p[-count:]), abs=1e-4)
    how = {"until": ["word"], "max_gen_toks": 4, "do_sample": False}
    (text,) = harness.generate_until([instance("generate_until", {}, ("Document 3", how), 0)])
    assert text == ours.generate("Document 3", max_tokens=4, stop="word", temperature=0).text


def test_a_transformer_needs_none_of_our_code(folders):
    code = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1]); t = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "out = m.generate(**t('Document 3', return_tensors='pt'), max_new_tokens=4, do_sample=False)\n"
        "assert not [m for m in sys.modules if m.startswith(('ebt_megatron', 'megatron'))]\n"
        "print(out[0].tolist())"
    )
    folder = str(folders["transformer"])
    done = subprocess.run([sys.executable, "-c", code, folder], cwd="/", capture_output=True, text=True, check=True)
    ours = ebt.load(folder)
    wanted = ours.encode("Document 3") + ours.generate("Document 3", max_tokens=4, temperature=0).tokens
    assert done.stdout.strip().splitlines()[-1] == str(wanted)

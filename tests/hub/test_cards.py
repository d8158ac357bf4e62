"""Cards: what they say is what files say. Files are changed and taken away one by one, and the card follows."""

import ast
import json
import re
import shutil

import pytest
import yaml
from datasets import Dataset, DatasetDict
from hub_cases import DRAWN, LOG, SETTINGS, make_evaluation, make_model
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from transformers import AutoTokenizer

from mobilellm_hf.hub import Target, package_model
from mobilellm_hf.hub.blocks import Record, code_blocks, weights_of
from mobilellm_hf.hub.cards import description_of, render, templates_folder, to_html
from mobilellm_hf.hub.context import NEUTRAL
from mobilellm_hf.hub.stages import SUFFIXES

REPO, STAGE = "org/tiny-base", "midtrain-stage1"
OF_CODE = ("0.6", "0.95", "0")


@pytest.fixture
def evaluated(model, tmp_path):
    return make_evaluation(tmp_path / "evaluation", model)


def card_of(model, evaluation=None, stage=STAGE, **options) -> str:
    return package_model(model, Target(REPO, stage), evaluation=evaluation, **options).card


def sections(card: str) -> list[str]:
    return re.findall(r"^## (.+)$", card, re.M)


def numbers(card: str) -> list[str]:
    """Of the text and the metadata; not of code, of links, of the citation, or of what the paper numbers."""
    text = re.sub(r"```.*?```", "", card, flags=re.S)
    text = re.sub(r"\]\([^)]*\)|MobileLLM-R1|llama4_text|\(equation \d\)|equation \d|Table \d|95%", "", text)
    return re.findall(r"(?<![\w.-])\d[\d,]*\.?\d*(?:e[-+]\d+)?", text)


def test_a_whole_run_has_all_sections(model, evaluated):
    card = card_of(model, evaluated, license="apache-2.0")
    assert sections(card) == [
        "Use", "Model", "Training data", "Training", "During training", "Evaluation", "Pictures", "Limits", "Licence",
        "Citation",
    ]  # fmt: skip
    assert "| peak learning rate | 0.00361 |" in card and "| steps | 2,411 |" in card
    assert "| steps taken | 2,411 |" in card and "| epochs |" not in card
    assert "| open_web_math | [open-web-math/open-web-math](" in card and "| 75.00% | 9,601 | 0.53 |" in card
    assert "| code | 5.6172 | 4.3391 |" in card
    assert "| teacher | meta-llama/Llama-3.1-8B-Instruct |" in card and "| temperature | 1.25 |" in card
    assert "| samples of positive influence in the last round | 77.7% |" in card
    assert "| gsm8k_8shot | exact_match | 16.37 | 1.02 | 1,319 | 1 | openai/gsm8k@e53f" in card
    assert "| humaneval | pass@1 | 44.72\\* |" in card and "\n\\* not the whole benchmark: " in card
    assert "learnt from [meta-llama/Llama-3.1-8B-Instruct]" in card
    assert "| MobileLLM-R1-140M-base | 4.6 | 16.3 | 5.4 | 15.9 | 44.3 |" in card and "not measured here" in card
    assert "Of humaneval 29 documents were asked, not all." in card
    assert "apache-2.0." in card and "Not known are those of notes, texts." in card


def test_metadata_are_what_the_hub_reads(model, evaluated):
    data = ModelCard(card_of(model, evaluated, license="apache-2.0")).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "text-generation", "apache-2.0")
    assert data.base_model == "meta-models/parent" and data.base_model_relation == "finetune"
    assert data.datasets == ["open-web-math/open-web-math", "org-a/texts"]
    (result,) = data.eval_results
    assert (result.dataset_type, result.metric_value, result.dataset_revision) == ("openai/gsm8k", 16.37, "e53f" * 10)
    assert data.model_name == "tiny-base"
    assert ModelCard(card_of(model)).data.to_dict().keys() == {
        "library_name", "pipeline_tag", "tags", "base_model", "base_model_relation", "datasets"
    }  # fmt: skip


@pytest.mark.parametrize("file, gone", [
    ("settings.json", {"Training"}),
    ("log.jsonl", {"During training"}),
    ("training.png", set()),
    ("mixture.yaml", set()),
    ("evaluation", {"Evaluation"}),
])  # fmt: skip
def test_a_file_that_is_not_there_takes_its_numbers_with_it(model, evaluated, file, gone):
    whole = card_of(model, evaluated)
    (model.parent / file).unlink() if file != "evaluation" else None
    card = card_of(model, None if file == "evaluation" else evaluated)
    assert set(sections(whole)) - set(sections(card)) == gone
    lost = {
        "settings.json": [
            "0.00361",
            "| steps | 2,411",
            "4,242",
            "1.25",
            "meta-llama",
            "meta-models",
            "mobilellm_hf` 0.1.0",
        ],
        "log.jsonl": ["5.6172", "4.3391", "77.7%"],
        "training.png": ["pictures/training.png"],
        "mixture.yaml": ["9,601", "75.00%", "12,807 tokens"],
        "evaluation": ["16.37", "1,319", "MobileLLM-R1-140M-base", "pictures/base.png"],
    }[file]
    for text in lost:
        assert text in whole and text not in card, text


def test_without_any_file_of_the_run_only_the_model_speaks(model):
    for path in model.parent.iterdir():
        if path.is_file():
            path.unlink()
    card = card_of(model)
    assert sections(card) == ["Use", "Model", "Limits", "Licence", "Citation"]
    config = json.loads((model / "config.json").read_text())
    known = {f"{value:,}" for value in config.values() if type(value) is int} | {"25,120", "1,000,000", "36", "1"}
    assert set(numbers(card)) <= known | {"2509.24945"}, set(numbers(card)) - known
    assert "No benchmark was run on it." in card and "without one, nobody else may use these weights" in card


def test_every_number_of_a_card_follows_its_file(model, evaluated):
    """All figures of all files are changed: no number of the first card stays but the model's."""
    before = set(numbers(card_of(model, evaluated)))
    settings = {name: value * 1.5 if type(value) is float else value + 1 if type(value) is int else value
                for name, value in SETTINGS.items()} | {"mobilellm_hf": "9.8.7"}  # fmt: skip
    (model.parent / "settings.json").write_text(json.dumps(settings))
    drawn = {name: {"rows": line["rows"] * 2 + 31, "tokens": line["tokens"] + 11_111, "epochs": line["epochs"] + 2}
             for name, line in DRAWN.items()}  # fmt: skip
    (model.parent / "mixture.yaml").write_text(yaml.safe_dump({"weights": {}, "drawn": drawn}))
    lines = [json.loads(line) for line in (model.parent / "log.jsonl").read_text().splitlines()]
    changed = [{name: value / 1.7 if type(value) is float else value for name, value in ln.items()} for ln in lines]
    changed[-1]["step"] = 2399
    (model.parent / "log.jsonl").write_text("\n".join(map(json.dumps, changed)))
    shutil.rmtree(evaluated)
    after = set(numbers(card_of(model)))
    config = json.loads((model / "config.json").read_text())
    of_the_model = {f"{value:,}" for value in config.values() if type(value) is int} | {"25,120", "1,000,000"}
    assert before & after <= of_the_model | {"2509.24945"}, before & after - of_the_model


def test_a_checkpoint_tells_of_itself_and_not_of_the_finished_run(model):
    state = {"global_step": 77, "log_history": [LOG[0], LOG[1] | {"probe_nll/code": 4.8765, "probe_nll/math": 4.5}]}
    (model / "trainer_state.json").write_text(json.dumps(state))
    release = package_model(model, Target(REPO, STAGE))
    assert "**A checkpoint of a training that goes on: step 77.**" in release.card
    assert "| code | 5.6172 | 4.8765 |" in release.card and "4.3391" not in release.card
    assert "9,601" not in release.card and "training.png" not in release.card and "steps taken" not in release.card
    assert {f.path for f in release.files if f.path.startswith("training/")} == {"training/settings.yaml"}


def test_results_of_other_weights_are_refused(model, evaluated):
    make_model(model, seed=5)
    with pytest.raises(ValueError, match="results.json is of other weights"):
        card_of(model, evaluated)


def test_results_of_no_evaluation_are_refused(model, tmp_path):
    with pytest.raises(ValueError, match="no results.json: give the folder that recipes/evaluate.py wrote"):
        card_of(model, tmp_path)


def test_nothing_of_this_machine_is_in_the_files(model, evaluated):
    release = package_model(model, Target(REPO, STAGE), evaluation=evaluated)
    for file in release.files:
        assert b"/home/someone" not in file.read() and str(model.parent).encode() not in file.read(), file.path
    release.refuse_leaks("hf_" + "x" * 34)
    settings = next(file for file in release.files if file.path == "training/settings.yaml")
    assert {"name": "notes.jsonl"} in yaml.safe_load(settings.read())["sources"]
    results = next(file for file in release.files if file.path == "evaluation/results.json")
    assert json.loads(results.read())["tasks"].keys() == {"gsm8k_8shot", "humaneval"}
    assert any(file.path == ".eval_results/gsm8k_8shot.yaml" for file in release.files)


def test_the_quickstart_claims_no_mixture_and_no_settings_of_one_model(model):
    for path in model.parent.iterdir():
        if path.is_file():
            path.unlink()
    (model.parent / "settings.json").write_text(json.dumps({"proxy_steps": 77, "learning_rate": 0.00347, "seed": 5}))
    (model.parent / "influence").mkdir()
    (model.parent / "influence/mixture.yaml").write_text(yaml.safe_dump({"weights": {"stdlib": 0.8125}}))
    card = card_of(model, stage="quickstart")
    assert "trained by the quickstart" in card and "## Training\n" not in card and "81.25" not in card
    assert (
        "| stdlib | those of the Python packages it is read from | 0.812 |" in card
        and "training/influence_mixture.yaml`, which influence" in card
    )


def test_conversations_say_what_was_left_out_and_epochs_count_without_steps(model):
    (model.parent / "mixture.yaml").unlink()
    (model.parent / "settings.json").write_text(json.dumps(SETTINGS | {"max_steps": -1, "num_train_epochs": 2.5}))
    line = {"source": "chats", "read": 7, "dropped": {"empty turn": 1_234}}
    (model.parent / "conversations.yaml").write_text(yaml.safe_dump([line]))
    card = card_of(model, stage="general")
    assert "| chats | not known | 100.00% |" in card and 'Left out of `chats`: 1,234 for "empty turn".' in card
    assert "| epochs | 2.5 |" in card and "| steps |" not in card


def test_pass_rates_have_their_intervals(model):
    rate = {"step": 0, "prompts": 64, "rate": 0.25, "low": 0.1606, "high": 0.3681}
    document = {
        "decoding": "greedy",
        "max_new_tokens": 2048,
        "before": rate,
        "after": rate | {"step": 40, "rate": 0.5},
    }
    (model.parent / "pass_rate.json").write_text(json.dumps(document))
    card = card_of(model, stage="grpo")
    assert "| before | 0 | 64 | 25.0% [16.1%, 36.8%] |" in card and "| after | 40 | 64 | 50.0%" in card


@pytest.mark.parametrize("stage", sorted(set(SUFFIXES) - {"on-device"}))
def test_every_stage_has_a_card_that_the_hub_parses(model, stage):
    card = card_of(model, stage=stage)
    assert ModelCard(card).data.pipeline_tag == "text-generation"
    assert "{{" not in card and "{%" not in card and "None" not in card.replace("None is named", "")
    if stage in ("general", "reasoning", "grpo"):
        assert "taught to answer" in card and "it continues text" not in card
    tables = [token for token in MarkdownIt("commonmark").enable("table").parse(card) if token.type == "table_open"]
    assert len(tables) == len(re.findall(r"^\|(?:-+:?\|)+$", card, re.M))  # none falls apart


def test_a_chat_template_is_used(model):
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    card = card_of(model, stage="reasoning")
    assert "apply_chat_template" in card and "temperature=0.6, top_p=0.95" in card and "max_new_tokens=36" in card


def test_a_description_of_the_users_own_is_taken_up(model):
    (model / "README.md").write_text(
        "---\nlicense: mit\n---\n\n# Mine\n\nIt likes tea.\n\n## How\n\n```\n# no title\n```\n"
    )
    card = card_of(model)
    assert "It likes tea.\n\n### How\n\n```\n# no title\n```" in card and "# Mine" not in card
    (model / "README.md").write_text("![tea](training.png)")
    card = card_of(model)
    assert card.count("pictures/training.png") == 1 and "![tea](pictures/training.png)" in card
    assert description_of("# A\n\ntext\n# B") == "text\n## B"
    assert description_of("a\n\n<!-- of this folder -->\nx\n<!-- end -->\n\nb") == "a\n\nb"


def test_of_the_metadata_of_the_users_own_card_only_the_licence_is_taken_over(model):
    """It is its owner's to say; what else metadata claim, files must bear out."""
    (model / "README.md").write_text("---\nlicense: mit\ntags: [tea]\ndatasets: [org/tea]\n---\n")
    release = package_model(model, Target(REPO, STAGE))
    data = ModelCard(release.card).data
    assert data.license == "mit" and "\nmit.\n" in release.card
    assert "- tea" not in release.card and "org/tea" not in release.card
    assert release.license == f"mit, as {model / 'README.md'} says"
    assert not any("licence is named" in note for note in release.notes)
    release = package_model(model, Target(REPO, STAGE), license="apache-2.0")
    assert ModelCard(release.card).data.license == "apache-2.0" and "option" in release.license
    (model / "README.md").write_text("No metadata.")
    assert package_model(model, Target(REPO, STAGE)).license is None
    (model / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(ValueError, match="the metadata of .*README.md cannot be read"):
        package_model(model, Target(REPO, STAGE))


def test_a_column_of_weights_is_there_where_a_mixture_has_them(model):
    card = card_of(model)
    assert "| source | data set | licence | weight | share of the rows | tokens | times read |" in card
    assert "| notes |  | not known | 0.333 | 2.50% | 307 | 0.09 |" in card
    assert "The weights are those of `training/mixture.yaml`." in card
    (model.parent / "mixture.yaml").write_text(yaml.safe_dump({"weights": {}, "drawn": DRAWN}))
    assert "| weight |" not in card_of(model) and "The weights are" not in card_of(model)


def test_what_was_cut_is_counted(model, evaluated):
    path = evaluated / "results.json"
    document = json.loads(path.read_text())
    first, second = document["tasks"]["gsm8k_8shot"], document["tasks"]["humaneval"]
    first["details"] = {"truncated_prompts": 1_234}
    second |= {"samples": 3}
    second["details"] |= {"own_max_new_tokens": 77, "share_cut_off": 0.5, "prompts_beyond_context": 5}
    path.write_text(json.dumps(document))
    card = card_of(model, evaluated)
    assert "- gsm8k_8shot: of 1,234 prompts the model saw the end only." in card
    line = next(line for line in card.splitlines() if line.startswith("- humaneval: "))
    for said in (
        "29 documents were asked, not all", "end at 77 tokens",
        "44 of 87 completions were cut off", "5 of 29 prompts do not fit",
    ):  # fmt: skip
        assert said in line, said
    first["details"], document["tasks"] = {}, {"gsm8k_8shot": first}
    path.write_text(json.dumps(document))
    assert "- gsm8k_8shot: " not in card_of(model, evaluated)


def asked(card: str) -> list[dict[str, str]]:
    return ast.literal_eval(re.search(r"^messages = (.+)$", card, re.M)[1])


def test_the_card_asks_what_the_run_has_taught(model):
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert asked(card_of(model, stage="grpo")) == NEUTRAL
    turn = {"role": "user", "content": 'the sum of\n"three"'}
    rows = {name: Dataset.from_dict({"prompt": [[turn | {"content": text}]]}) for name, text in
            (("held_out", turn["content"]), ("train", "add"), ("long", "the sum of three " * 12))}  # fmt: skip
    for parts, expected in (
        (("held_out", "train"), turn["content"]), (("train",), "add"), (("long",), NEUTRAL[0]["content"])
    ):  # fmt: skip
        shutil.rmtree(model.parent / "prompts", ignore_errors=True)
        named = {"train" if part == "long" else part: rows[part] for part in parts}
        DatasetDict(named).save_to_disk(model.parent / "prompts")
        card = card_of(model, stage="grpo")
        assert asked(card)[0]["content"] == expected
        length = len(AutoTokenizer.from_pretrained(model)(expected)["input_ids"])
        assert int(re.search(r"max_new_tokens=(\d+)", card)[1]) <= 72 - length


@pytest.mark.parametrize("context, long", [(1024, False), (1025, True)])
def test_only_a_long_context_has_room_to_reason_at_length(model, context, long):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": context}))
    card = card_of(model, stage="reasoning")
    assert ("It may reason at length and end in a wrong answer" in card) is long
    assert ("It may end in a wrong answer" in card) is not long


def test_paths_of_this_machine_in_a_description_are_shown_by_name(model):
    """As the settings of a quickstart with --extra-source have them; the release goes on."""
    (model / "README.md").write_text("- `extra_source`: ['math:/home/me/my/notes.jsonl', 'code:runs/x.py']\n")
    release = package_model(model, Target(REPO, STAGE))
    assert "['math:notes.jsonl', 'code:runs/x.py']" in release.card
    release.refuse_leaks(None)


def test_the_data_of_the_stages_before_have_their_licences_too(model, tmp_path):
    before = tmp_path / "earlier" / "tiny-pretrain"
    make_model(before)
    sources = [{"catalog": "open_web_math"}, {"catalog": "gsm8k"}, {"name": "/home/me/early.jsonl"}]
    (before.parent / "settings.json").write_text(json.dumps({"stage": "pretrain", "sources": sources}))
    drawn = dict.fromkeys(("open_web_math", "gsm8k", "early"), DRAWN["notes"])
    (before.parent / "mixture.yaml").write_text(yaml.safe_dump({"weights": {}, "drawn": drawn}))
    (model.parent / "settings.json").write_text(json.dumps(SETTINGS | {"model": str(before)}))
    release = package_model(model, Target(REPO, STAGE))
    licences = release.card.split("## Licence")[1]
    assert "| gsm8k | [openai/gsm8k](https://huggingface.co/datasets/openai/gsm8k) | mit |" in licences
    assert "open_web_math" not in licences and "Not known are those of notes, texts, early." in licences
    assert len(re.findall(r"^\| source \|", release.card, re.M)) == 2
    assert release.licenses["gsm8k"] == "mit" and release.licenses["early"] == "not known"
    assert ModelCard(release.card).data.datasets == ["open-web-math/open-web-math", "org-a/texts"]


def test_a_stale_record_is_not_believed(model):
    release = package_model(model, Target(REPO, STAGE))
    blocks = code_blocks(release.card)
    assert list(blocks) == ["with-plugin", "without-plugin", "vllm"]
    assert release.card.count("*Not run.*") == 3
    record = Record()
    record.note(blocks["with-plugin"], weights_of(release.files), "the Hub")
    record.save(release.folder / "verification.json")
    release = package_model(model, Target(REPO, STAGE))
    assert re.search(r"\*Run on \d{4}-\d\d-\d\d, from the Hub: torch ", release.card)
    assert release.card.count("*Not run.*") == 2 and any(file.path == "verification.json" for file in release.files)
    other = package_model(model, Target("org/another-base", STAGE), staging=release.folder)
    assert other.card.count("*Not run.*") == 3  # other code
    make_model(model, seed=3)
    release = package_model(model, Target(REPO, STAGE))
    assert release.card.count("*Not run.*") == 3 and all(file.path != "verification.json" for file in release.files)


def test_the_page_shows_what_the_card_says(model):
    release = package_model(model, Target(REPO, STAGE))
    page = release.write_preview().read_text()
    assert '<img src="pictures/training.png"' in page and (release.folder / "pictures/training.png").exists()
    assert "<td>open_web_math</td>" in page and "pipeline_tag: text-generation" in page
    assert "block: with-plugin --&gt;" not in page and '<code class="language-python">import mobilellm_hf' in page
    assert "model.safetensors" in (release.folder / "files.txt").read_text()
    assert to_html("# A <b>", "a & b").count("a &amp; b") == 1


def test_a_template_that_asks_for_what_is_not_there_is_an_error(monkeypatch, tmp_path):
    shutil.copytree(templates_folder(), tmp_path / "cards")
    (tmp_path / "cards/broken.md").write_text("{{ facts.nothing }}")
    monkeypatch.setattr("mobilellm_hf.hub.cards.templates_folder", lambda: tmp_path / "cards")
    with pytest.raises(ValueError, match="broken.md cannot be rendered: .*nothing"):
        render("broken.md", {"facts": object()})


def test_templates_say_no_figures_of_their_own():
    """Numbers in templates are the paper's numbering, the code's, or of the citation."""
    for template in templates_folder().glob("*.md"):
        if template.name == "quickstart_model.md":
            continue
        text = re.sub(r"{[{%#].*?[}%#]}", "", template.read_text(), flags=re.S)
        assert set(numbers(text)) <= {"2.1.1", "2509.24945", "1", "2", *OF_CODE}, template.name

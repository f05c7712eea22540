"""Evaluation: windows, losses, hashes, texts by name, scores of token ids, and bad input."""

import json
import math
import sys
import threading
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from click.testing import CliRunner, Result

from llmpq.checkpoint.checkpoint import Checkpoint
from llmpq.cli.eval import EvalOptions, main, show_results
from llmpq.errors import FailedRequests, UserError
from llmpq.evaluation import perplexity as evaluation
from llmpq.evaluation.harness import run_tasks
from llmpq.evaluation.perplexity import Loss, evaluate, load_stages, next_token_loss, window_tokens
from llmpq.evaluation.pipeline_loss import PipelineLoss
from llmpq.evaluation.quality_check import compare, summary
from llmpq.evaluation.scorer import NonFiniteLogits, Scorer
from llmpq.evaluation.tasks import load_tasks
from llmpq.evaluation.texts import DATASETS, named_text
from llmpq.model_spec import ASSETS
from llmpq.models.stage_model import load_config
from llmpq.runtime.sampler import Sampling
from llmpq.runtime.transport import LocalHub, LocalTransport
from llmpq.runtime.weights_hash import gather_hashes, weights_hash

CPU = torch.device("cpu")
TINY_TALES = ASSETS / "tiny-tales"
CUTS = [(0, 2), (2, 3), (3, 8)]
MIXED = ["4", "16", "8", "3", "3", "8", "4", "16"]


def stages(cuts, precisions=MIXED):
    config = load_config(TINY_TALES)
    return load_stages(config, Checkpoint(TINY_TALES), cuts, precisions, torch.float32, CPU)


@pytest.fixture(scope="module")
def three():
    return stages(CUTS)


def token_ids(count, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 1536, (count, length), generator=generator)


def test_a_window_is_what_the_model_sees_and_2048_at_most():
    assert window_tokens(None, 512) == 512
    assert window_tokens(None, 131072) == 2048
    assert window_tokens(4096, 131072) == 4096
    with pytest.raises(UserError, match="--window 513: the model has 512 positions"):
        window_tokens(513, 512)


def test_logits_in_small_pieces_change_nothing(three, monkeypatch):
    hidden = torch.randn(3, 20, 192, generator=torch.Generator().manual_seed(1))
    whole = next_token_loss(three[-1], hidden, token_ids(3, 20))
    monkeypatch.setattr(evaluation, "LOGITS_AT_ONCE", 7 * 1536)
    assert next_token_loss(three[-1], hidden, token_ids(3, 20)) == pytest.approx(whole, rel=1e-6)


def through_threads(three, work):
    """What `work(stage, transport)` gives on each stage, all at once."""
    hub, results = LocalHub(len(three)), {}

    def run(rank):
        try:
            results[rank] = work(three[rank], LocalTransport(rank, hub))
        except BaseException:
            hub.abort()
            raise

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(three))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [results[rank] for rank in range(len(three))]


def test_the_loss_through_transports_is_that_of_one_process(three, monkeypatch):
    windows, said = token_ids(5, 32), []
    monkeypatch.setattr(evaluation, "TOKENS_AT_ONCE", 64)  # two windows at once, as below
    expected = evaluate(three, windows)

    def work(stage, transport):
        pipeline = PipelineLoss(stage, transport)
        if transport.rank == 0:
            return pipeline.lead(windows, tokens_at_once=64, on_windows=said.append)
        return pipeline.follow()

    assert through_threads(three, work) == [expected] * 3
    assert expected.num_tokens == 5 * 31
    assert said == [2, 4, 5]


def test_hashes_tell_weights_apart_and_nothing_else(three):
    again = stages(CUTS)
    assert list(map(weights_hash, again)) == list(map(weights_hash, three))
    assert through_threads(again, gather_hashes)[1] == list(map(weights_hash, three))
    other = stages(CUTS, ["4", "16", "8", "3", "3", "8", "4", "4"])
    assert [weights_hash(a) == weights_hash(b) for a, b in zip(other, three, strict=True)] == [
        True,
        True,
        False,
    ]
    for linear in again[0].linears().values():
        if hasattr(linear, "scales"):
            linear.scales.view(-1)[5] *= 2
            break
    assert weights_hash(again[0]) != weights_hash(three[0])


def test_the_check_of_a_run_says_what_was_predicted_and_what_is():
    base, served = Loss(3000.0, 1020), Loss(3003.0, 1020)
    report = SimpleNamespace(predicted=SimpleNamespace(quality_loss_percent=0.25))
    quality = compare(report, served, base, Path("deep/text.txt"), 256)
    assert quality.measured_percent == pytest.approx(100 * (math.exp(3 / 1020) - 1))
    assert summary(quality) == (
        "quality: predicted +0.25 %, measured +0.29 % "
        "(perplexity 18.94 -> 18.99 on text.txt, 1,020 tokens)"
    )
    unpredicted = compare(SimpleNamespace(predicted=None), served, base, None, 256)
    assert "nothing was predicted, measured +0.29 %" in summary(unpredicted)
    assert unpredicted.text == "evaluation.txt"


# ---- scores


@torch.inference_mode()
def alone(three, context, continuation):
    """Log-likelihood of a continuation, its input neither padded nor cut."""
    hidden = three[0].embed(torch.tensor([[*context, *continuation][:-1]]))
    for stage in three:
        hidden = stage.run(hidden)
    logs = three[-1].head(hidden)[0].float().log_softmax(-1)[-len(continuation) :]
    return sum(float(row[token]) for row, token in zip(logs, continuation, strict=True))


def test_scores_do_not_depend_on_the_others_of_a_batch(three):
    lengths = [(5, 3), (40, 1), (1, 9), (17, 17), (2, 1)]
    ids = token_ids(len(lengths), 60).tolist()
    pairs = [(row[:a], row[a : a + b]) for row, (a, b) in zip(ids, lengths, strict=True)]
    done = []
    scores = Scorer(three, 512).score(pairs, done.append)
    for (value, _), pair in zip(scores, pairs, strict=True):
        assert value == pytest.approx(alone(three, *pair), rel=1e-4)
    assert done[-1] == len(pairs)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_is_neither_a_score_nor_a_continuation(bad):
    broken = stages(CUTS, ["16"] * 8)
    with torch.no_grad():
        list(broken[1].linears().values())[-1].weight[0, 0] = bad
    ids, scorer = token_ids(1, 12)[0].tolist(), Scorer(broken, 512)
    with pytest.raises(NonFiniteLogits, match="logits are not finite"):
        scorer.score([(ids[:8], ids[8:])])
    with pytest.raises(NonFiniteLogits, match="logits are not finite"):
        scorer.generate([ids], 4)


def test_tasks_on_broken_logits_have_scores_that_are_no_numbers(monkeypatch, capsys):
    def fail(*_, **__):
        raise NonFiniteLogits("as a scorer does")

    evaluator = ModuleType("lm_eval.evaluator")
    evaluator.evaluate = fail
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", evaluator)
    monkeypatch.setitem(sys.modules, "lm_eval", ModuleType("lm_eval"))
    task = SimpleNamespace(set_fewshot_seed=lambda seed: None)
    [score] = run_tasks({"tasks": {"piqa": task}}, None, None)
    assert score.task == "piqa" and math.isnan(score.value)
    subject = SimpleNamespace(name="uniform-4", precisions=("4",))
    options = EvalOptions(json_path=Path("-"), quiet=True)
    with pytest.raises(FailedRequests, match="uniform-4 on piqa"):
        show_results([], [(subject, score)], options, "stages", 512)
    data = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert data["tasks"][0]["value"] is None


def test_what_is_too_long_loses_its_beginning(three):
    ids = token_ids(1, 30)[0].tolist()
    [(cut, _)] = Scorer(three, 16).score([(ids[:25], ids[25:])])
    assert cut == pytest.approx(alone(three, ids[13:25], ids[25:]), rel=1e-5)


def test_greedy_answers_are_recognised(three):
    scorer = Scorer(three, 512)
    prompts = [row[:n] for row, n in zip(token_ids(3, 30).tolist(), (4, 30, 11), strict=True)]
    answers = scorer.generate(prompts, 6)
    assert [len(answer) for answer in answers] == [6, 6, 6]
    for prompt, answer in zip(prompts, answers, strict=True):
        assert scorer.generate([prompt], 6) == [answer]  # padding on the left changes nothing
    scores = scorer.score(list(zip(prompts, answers, strict=True)))
    assert all(greedy for _, greedy in scores)
    wrong = [answer[:-1] + [answer[-1] ^ 1] for answer in answers]
    assert not any(greedy for _, greedy in scorer.score(list(zip(prompts, wrong, strict=True))))


def test_generation_ends_where_it_is_told_to(three):
    scorer, prompts = Scorer(three, 512), token_ids(2, 8).tolist()
    free = scorer.generate(prompts, 8)
    ended = scorer.generate(prompts, 8, ends=lambda tokens: tokens[-1] == free[0][2])
    assert ended[0] == free[0][: free[0].index(free[0][2]) + 1]
    sampled = scorer.generate(prompts, 8, Sampling(temperature=5.0))
    assert sampled != free and sampled == scorer.generate(prompts, 8, Sampling(temperature=5.0))


# ---- texts


@pytest.mark.parametrize("name", DATASETS)
def test_a_text_file_is_taken_as_it_is(tmp_path, name):
    (tmp_path / DATASETS[name].file).write_text(" a <unk> \n\n b ")
    assert named_text(name, tmp_path) == " a <unk> \n\n b "


def test_rows_are_joined_as_the_papers_do():
    rows = [{"text": "", "sentence": "no it"}, {"text": " = A = \n", "sentence": "was n't"}]
    assert DATASETS["wikitext2"].join(rows, "") == "\n\n = A = \n"
    assert DATASETS["ptb"].join(rows, "") == "no it was n't"
    assert DATASETS["c4"].join([{"text": "x"}] * 2000, "") == " ".join("x" * 1100)
    with pytest.raises(UserError, match="f.parquet: has rows without text in 'sentence'"):
        DATASETS["ptb"].join([{"text": "x"}], "f.parquet")


@pytest.mark.library("datasets")
def test_files_of_the_hub_are_read(tmp_path):
    path = tmp_path / "c4" / "en" / "c4-validation.00000-of-00008.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    assert named_text("c4", tmp_path) == "one two"
    import pandas

    path = tmp_path / "wikitext-2-raw-v1" / "test-00000-of-00001.parquet"
    path.parent.mkdir()
    pandas.DataFrame({"text": ["", " = A = \n"]}).to_parquet(path)
    assert named_text("wikitext2", tmp_path) == "\n\n = A = \n"


def test_a_text_that_is_nowhere_says_what_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError) as error:
        named_text("ptb", tmp_path)
    for part in (tmp_path, "ptb.test.txt", "ptb-text-only", "--text FILE", "llmpq[eval]"):
        assert str(part) in str(error.value)


# ---- bad input


def call(*arguments) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def check(result: Result, *parts: object) -> None:
    """Exit code 2 and a message in which all `parts` occur."""
    assert result.exit_code == 2, (result.stderr, result.exception)
    assert isinstance(result.exception, SystemExit), result.exception
    for part in parts:
        assert str(part) in result.stderr, result.stderr


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--dataset", "pile"], ["'pile'", "wikitext2", "ptb", "c4"]),
        (["--dataset", "ptb", "--data", "/nowhere"], ["/nowhere: no such folder"]),
        (["--window", 513], ["--window 513", "512 positions"]),
        (["--limit", 3, "--task-data", "x"], ["--task-data, --limit: only with --tasks"]),
        (["--tasks", "piqa", "--stream"], ["leave --stream out"]),
        (["--tasks", ", "], ["names nothing"]),
        (["--stream", "--processes"], ["only one of"]),
        (["--processes"], ["name a plan"]),
        (["--processes", "--precisions", "8"], ["is for plans"]),
        (["--quantizer", "gptq"], ["needs --moments FILE", "llmpq-profile sensitivity"]),
        (["--quantizer", "mse", "--moments", "m"], ["rounded by gptq, but by mse"]),
        (["--moments", "/nowhere/m.safetensors"], ["/nowhere/m.safetensors: no such file"]),
    ],
)
def test_bad_input(arguments, parts):
    check(call(*arguments), *parts)


def test_tasks_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    check(call("--tasks", "piqa"), "need lm-eval", "pip install 'llmpq[eval]'")


def test_only_tasks_are_run_where_no_text_is_named(monkeypatch):
    """The shipped text is for those who name nothing at all."""
    assert EvalOptions(tasks=("piqa",)).texts == []
    assert [label for label, _ in EvalOptions().texts] == ["evaluation.txt"]
    both = EvalOptions(tasks=("piqa",), dataset=("c4",))
    assert [label for label, _ in both.texts] == ["c4"]


# ---- tasks


@pytest.fixture
def lm_eval(monkeypatch):
    """lm-eval with its tasks of one folder: to read all takes seconds."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    folder = Path(lm_eval.__file__).parent / "tasks" / "piqa"
    few = partial(TaskManager, include_path=folder, include_defaults=False)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", few)


@pytest.mark.library("lm_eval")
def test_an_unknown_task_names_what_is_near(lm_eval, tmp_path):
    with pytest.raises(UserError, match=r"has no task 'piqq'; similar: .*piqa"):
        load_tasks(["piqq"], None, None, tmp_path)


@pytest.mark.library("lm_eval")
def test_data_of_a_task_is_read_from_a_folder(lm_eval, tmp_path):
    folder = tmp_path / "data" / "piqa"
    folder.mkdir(parents=True)
    rows = [{"goal": f"g{i}", "sol1": "a", "sol2": "b"} for i in range(3)]
    (folder / "valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "valid-labels.lst").write_text("0\n1\n1\n")
    for number, place in enumerate((folder, folder.parent)):
        scratch = tmp_path / str(number)
        scratch.mkdir()
        tasks = load_tasks(["piqa"], place, None, scratch)["tasks"]
        docs = list(tasks["piqa"].validation_docs())
        assert [doc["label"] for doc in docs] == [0, 1, 1]
        assert tasks["piqa"].doc_to_text(docs[2]) == "Question: g2\nAnswer:"
        assert tasks["piqa"].get_config("num_fewshot") == 0


@pytest.mark.library("lm_eval")
def test_labels_that_do_not_match_are_refused(lm_eval, tmp_path):
    folder = tmp_path / "piqa"
    folder.mkdir()
    (folder / "valid.jsonl").write_text('{"goal": "g", "sol1": "a", "sol2": "b"}\n')
    (folder / "valid-labels.lst").write_text("0\n1\n")
    with pytest.raises(UserError, match="has 2 labels for 1 rows"):
        load_tasks(["piqa"], tmp_path, None, tmp_path)

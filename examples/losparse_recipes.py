"""LoSparse as published: DeBERTaV3-base on GLUE and SQuAD, BART-large on XSum and CNN/DailyMail.

    python -m examples.losparse_recipes mnli --out mnli-20

downloads the model and the data from the hub, fine-tunes with the settings of the authors' public
scripts (github.com/yxli2123/LoSparse) and writes the compact model.  ``--model`` and ``--data``
take local folders instead.  None of these trainings was done for this book: they take a GPU for
hours and a network.  The tests run the same code on tiny random models of these architectures.

    python -m examples.losparse_recipes mnli --out mnli-25-distilled \\
        --student mnli-25 --teacher textattack/bert-base-uncased-MNLI

is the published distillation, which starts from a pruned model that is stored: the folder `student`
that the first command wrote (of a BERT, by ``--model``), whose rows and rank stay as they are.

From the public scripts: MNLI, XSum and CNN/DailyMail, all of it; for SQuAD too, but the script
trains bert-base-uncased there, and the model here is that of the README's table.  Our choice: all
other tasks of GLUE, which have MNLI's settings (but for the number of epochs of small ones), and
giving warm-up and cool-down as shares of the training, so that other data may be given.

Book: chapter 14.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from slr.methods import losparse
from slr.model.data import hub_dataset

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["RECIPES", "TEACHING", "FineTuning", "distil", "encode", "fine_tune", "load"]

HEADS = {
    "classification": "AutoModelForSequenceClassification",
    "answers": "AutoModelForQuestionAnswering",
    "summaries": "AutoModelForSeq2SeqLM",
}


@dataclass(frozen=True)
class FineTuning:
    """One task and how to train it.

    Attributes:
        kind: a key of :data:`HEADS`.
        data: hub name, configuration and columns; `data_path` is ``(name, configuration)``.
        labels: classes; 1 is regression.
        rank_ratio: ρ of U and V.
        rows: final share of the rows of S; ``rank_ratio + rows`` is what remains.
        batch, accumulation: examples in a pass, passes in a step.
        lr_warmup: share of the steps in which the learning rate rises; then it falls linearly.
        warmup, cooldown: shares of the steps before pruning begins and after it ends.
        length, target: tokens of an input, and of a summary.
    """

    model: str
    kind: str
    data_path: tuple[str, str | None]
    columns: tuple[str, ...]
    validation: str
    rank_ratio: float
    rows: float
    lr: float
    epochs: int
    batch: int
    warmup: float
    cooldown: float
    labels: int = 2
    accumulation: int = 1
    lr_warmup: float = 0.0
    beta1: float = 0.85
    length: int = 128
    target: int = 128
    stride: int = 128
    seed: int = 7


# train_glue.sh: 392,702 examples, 8 epochs of 1,534 steps of 8 × 32; 480 steps of rising learning
# rate, 675 before pruning, 5 · 675 after it.
_STEPS = 8 * 1534
MNLI = FineTuning(
    "microsoft/deberta-v3-base", "classification", ("nyu-mll/glue", "mnli"),
    ("premise", "hypothesis"), "validation_matched", rank_ratio=0.05, rows=0.15, lr=9e-5,
    epochs=8, batch=32, accumulation=8, labels=3, lr_warmup=480 / _STEPS, warmup=675 / _STEPS,
    cooldown=5 * 675 / _STEPS,
)  # fmt: skip
# train_qa.sh: 10 epochs, of which pruning leaves out one at first (5,400 steps) and five at last;
# 3,681 steps of rising learning rate.
SQUAD = FineTuning(
    "microsoft/deberta-v3-base", "answers", ("rajpurkar/squad", None), ("question", "context"),
    "validation", rank_ratio=0.05, rows=0.45, lr=5e-5, epochs=10, batch=16, warmup=1 / 10,
    cooldown=5 / 10, lr_warmup=3681 / 54_000, length=384,
)  # fmt: skip
# train_summarization.sh: 12 epochs, of which pruning leaves out two at first (12,800 steps) and
# eight at last.
XSUM = FineTuning(
    "facebook/bart-large", "summaries", ("EdinburghNLP/xsum", None), ("document", "summary"),
    "validation", rank_ratio=0.35, rows=0.05, lr=6e-5, epochs=12, batch=32, warmup=2 / 12,
    cooldown=8 / 12, length=256, seed=42,
)  # fmt: skip


def _glue(task: str, columns: tuple[str, ...], **other: Any) -> FineTuning:
    found = replace(MNLI, data_path=("nyu-mll/glue", task), columns=columns, labels=2)
    return replace(found, **{"validation": "validation", **other})


RECIPES = {
    "mnli": MNLI,
    "rte": _glue("rte", ("sentence1", "sentence2"), epochs=20, accumulation=1),
    "qnli": _glue("qnli", ("question", "sentence")),
    "mrpc": _glue("mrpc", ("sentence1", "sentence2"), epochs=20, accumulation=1),
    "qqp": _glue("qqp", ("question1", "question2")),
    "sst2": _glue("sst2", ("sentence",)),
    "cola": _glue("cola", ("sentence",), epochs=20, accumulation=1),
    "stsb": _glue("stsb", ("sentence1", "sentence2"), epochs=20, accumulation=1, labels=1),
    "squad": SQUAD,
    "xsum": XSUM,
    "cnn_dailymail": replace(
        XSUM, data_path=("abisee/cnn_dailymail", "3.0.0"), columns=("article", "highlights")
    ),
}


# train_glue_distil.sh, of a BERT-base that keeps 25% or 50%: what differs from its task's recipe.
TEACHING: dict[str, Any] = {"epochs": 50, "accumulation": 1, "lr_warmup": 0.0}


def encode(row: dict, tokenizer: PreTrainedTokenizerBase, recipe: FineTuning) -> list[dict]:
    """One example as what the model takes: one item, or several if its context is long.

    Args:
        row: the recipe's columns, and ``label`` or ``answers`` (as in GLUE and SQuAD).
        tokenizer: of the model; a fast one for answers.
        recipe: its kind and lengths.

    Raises:
        KeyError: a column is missing.

    >>> from types import SimpleNamespace
    >>> def words(*texts, **options):
    ...     return {"input_ids": [len(word) for text in texts for word in text.split()]}
    >>> encode({"sentence": "a fine day", "label": 1}, words, RECIPES["sst2"])
    [{'input_ids': [1, 4, 3], 'labels': 1}]
    """
    texts = [row[column] for column in recipe.columns]
    if recipe.kind == "classification":
        items = tokenizer(*texts, truncation=True, max_length=recipe.length)
        kind = float if recipe.labels == 1 else int
        return [{**items, "labels": kind(row["label"])}]
    if recipe.kind == "summaries":
        items = tokenizer(texts[0], truncation=True, max_length=recipe.length)
        target = tokenizer(text_target=texts[1], truncation=True, max_length=recipe.target)
        return [{**items, "labels": target["input_ids"]}]
    found = tokenizer(
        texts[0].lstrip(), texts[1], truncation="only_second", max_length=recipe.length,
        stride=min(recipe.stride, recipe.length // 3), return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )  # fmt: skip
    first = row["answers"]["answer_start"][0]
    last = first + len(row["answers"]["text"][0])
    made = []
    for i, offsets in enumerate(found["offset_mapping"]):
        inside = [t for t, part in enumerate(found.sequence_ids(i)) if part == 1]
        at = [t for t in inside if offsets[t][0] < last and offsets[t][1] > first]
        whole = at and offsets[inside[0]][0] <= first and offsets[inside[-1]][1] >= last
        item = {k: found[k][i] for k in tokenizer.model_input_names if k in found}
        span = (at[0], at[-1]) if whole else (0, 0)  # the first token: not in this window
        made.append({**item, "start_positions": span[0], "end_positions": span[1]})
    return made


def fine_tune(
    recipe: str | FineTuning,
    out: str | Path,
    *,
    model: str | Path | None = None,
    data: str | Path | None = None,
    mode: str = "losparse",
    **other: Any,
) -> dict:
    """Fine-tune and prune a model by a recipe, and write it compact.  Goes on if it was stopped.

    Args:
        recipe: a name in :data:`RECIPES`, or a recipe of one's own.
        out: folder to make: ``model.safetensors``, configuration, tokenizer and ``losparse.json``.
        model: hub name or folder of another model of the same kind.
        data: folder with ``train.jsonl`` and ``validation.jsonl``, a JSON object with the
            recipe's columns a line; ``None`` takes the recipe's from the hub.
        mode: one of :data:`~slr.methods.losparse.MODES`; the same share remains in each.
        other: of ``transformers.TrainingArguments``, as ``use_cpu=True`` or ``bf16=True``.

    Returns:
        What ``losparse.json`` says: recipe, share that remains, loss and score on the validation
        data (accuracy; Pearson's correlation for regression; share of windows whose answer is
        found exactly; summaries have the loss only).

    Raises:
        ValueError: an unknown recipe, a folder that is complete, missing files, a diverging loss.
        RuntimeError: the hub did not give the data.

    Cost: the training; on a GPU hours.  Example: ``tests/test_losparse_recipes.py``.
    """
    recipe, out = _begin(recipe, out)
    source = str(model or recipe.model)
    tokenizer, network = _pretrained(recipe, source)
    train, validation = _items(recipe, data, tokenizer)
    remaining = recipe.rank_ratio + recipe.rows
    ratio = recipe.rank_ratio if mode == "losparse" else remaining
    losparse.convert(network, mode=mode, rank_ratio=ratio)
    steps, callbacks = _steps(recipe, train), []
    if mode != "lowrank":
        pruner = losparse.Pruner(
            network, remaining=remaining, steps=steps, beta1=recipe.beta1,
            warmup=int(recipe.warmup * steps), cooldown=int(recipe.cooldown * steps),
        )  # fmt: skip
        callbacks.append(losparse.callback(pruner))
    trainer = _trainer(
        recipe, out, network, tokenizer, train, validation, other, callbacks=callbacks
    )
    return _finish(trainer, recipe, out, tokenizer, {"model": source, "mode": mode})


def distil(
    recipe: str | FineTuning,
    out: str | Path,
    *,
    student: str | Path,
    teacher: str | Path,
    data: str | Path | None = None,
    distillation: losparse.Distillation | None = None,
    **other: Any,
) -> dict:
    """Phase two: a stored pruned student learns its task again, and from a dense teacher.

    Args:
        recipe: a name in :data:`RECIPES`, then with :data:`TEACHING`, or a recipe of one's own;
            of a classification.  What it says of pruning has no effect.
        out: folder to make, of the same form as that of :func:`fine_tune`.
        student: folder that :func:`fine_tune` wrote.
        teacher: hub name or folder of a dense model, fine-tuned on the task, whose hidden states
            have the student's shapes.
        data, other: as for :func:`fine_tune`.
        distillation: what to learn of the teacher; by default as published.

    Returns:
        What ``losparse.json`` says, as of :func:`fine_tune`, with `student` and `teacher`.

    Raises:
        ValueError: as :func:`fine_tune`; a recipe of another kind, a folder that holds no student,
            or a teacher that does not fit it.
        RuntimeError: the hub did not give the data.

    Cost: the training, with a forward pass of the teacher in each step.
    Example: ``tests/test_losparse_recipes.py``.
    """
    import transformers

    named = isinstance(recipe, str)
    recipe, out = _begin(recipe, out)
    recipe = replace(recipe, **TEACHING) if named else recipe
    if recipe.kind != "classification":
        raise ValueError(f"recipe is of {recipe.kind}; only a classification is distilled")
    distillation = distillation or losparse.Distillation()
    network = load(student)
    losparse.compact(network)
    tokenizer = transformers.AutoTokenizer.from_pretrained(student, trust_remote_code=False)
    _, dense = _pretrained(recipe, str(teacher))
    dense.eval()

    class Distiller(transformers.Trainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, **more: Any
        ) -> Any:
            if not model.training:
                return super().compute_loss(model, inputs, return_outputs, **more)
            loss, outputs = distillation.learn(model, dense.to(self.args.device), inputs)
            return (loss, outputs) if return_outputs else loss

    train, validation = _items(recipe, data, tokenizer)
    trainer = _trainer(recipe, out, network, tokenizer, train, validation, other, kind=Distiller)
    trainer.model_accepts_loss_kwargs = False  # the loss is a mean; it is divided by accumulation
    told = {"model": str(student), "teacher": str(teacher), "distillation": asdict(distillation)}
    return _finish(trainer, recipe, out, tokenizer, told)


def _begin(recipe: str | FineTuning, out: str | Path) -> tuple[FineTuning, Path]:
    """The recipe of a name, and a folder that may be written."""
    if isinstance(recipe, str):
        if recipe not in RECIPES:
            raise ValueError(f"recipe {recipe!r} is unknown; there are {', '.join(RECIPES)}")
        recipe = RECIPES[recipe]
    if (Path(out) / "losparse.json").is_file():
        raise ValueError(f"{out} is complete already; give another folder")
    return recipe, Path(out)


def _pretrained(recipe: FineTuning, source: str) -> tuple[PreTrainedTokenizerBase, Any]:
    """Tokenizer and dense model."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    head = getattr(transformers, HEADS[recipe.kind])
    labels = {"num_labels": recipe.labels} if recipe.kind == "classification" else {}
    return tokenizer, head.from_pretrained(
        source, use_safetensors=True, trust_remote_code=False, **labels
    )


def _items(recipe: FineTuning, data: str | Path | None, tokenizer: Any) -> list[list[dict]]:
    """Training and validation data as what the model takes."""
    return [
        [item for row in _rows(recipe, data, split) for item in encode(row, tokenizer, recipe)]
        for split in ("train", recipe.validation)
    ]


def _steps(recipe: FineTuning, train: list[dict]) -> int:
    return recipe.epochs * math.ceil(len(train) / (recipe.batch * recipe.accumulation))


def _trainer(
    recipe: FineTuning, out: Path, network: Any, tokenizer: Any, train: list[dict],
    validation: list[dict], other: dict, kind: Any = None, callbacks: Any = (),
) -> Any:  # fmt: skip
    """A ``Trainer``, or one of its `kind`, by the recipe."""
    from transformers import Trainer, TrainingArguments

    steps = _steps(recipe, train)
    arguments = TrainingArguments(
        **{
            "output_dir": str(out / "training"),
            "max_steps": steps,
            "learning_rate": recipe.lr,
            "per_device_train_batch_size": recipe.batch,
            "seed": recipe.seed,
            "gradient_accumulation_steps": recipe.accumulation,
            "max_grad_norm": 0.0,
            "warmup_steps": int(recipe.lr_warmup * steps),
            "save_total_limit": 1,
            "report_to": [],
            **other,
        }
    )
    return (kind or Trainer)(
        network, arguments, train_dataset=train, eval_dataset=validation, callbacks=[*callbacks],
        data_collator=_collator(recipe, tokenizer, network), compute_metrics=_score(recipe),
    )  # fmt: skip


def _finish(trainer: Any, recipe: FineTuning, out: Path, tokenizer: Any, told: dict) -> dict:
    """Train, or go on; make compact, measure and write."""
    from transformers.trainer_utils import get_last_checkpoint

    network, steps = trainer.model, trainer.args.max_steps
    last = get_last_checkpoint(trainer.args.output_dir) if (out / "training").is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    account = losparse.compact(network)
    measured = {k: v for k, v in trainer.evaluate().items() if k in ("eval_loss", "eval_score")}
    losparse.save(network, out / "model.safetensors")
    network.config.save_pretrained(out)
    tokenizer.save_pretrained(out)
    found = {
        "recipe": asdict(recipe), **told, "steps": steps,
        "remaining": account.nonzero / account.parameters, **measured,
    }  # fmt: skip
    (out / "losparse.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(out / "training", ignore_errors=True)
    return found


def load(folder: str | Path) -> nn.Module:
    """The model that :func:`fine_tune` wrote, bit for bit.

    Raises:
        ValueError: no such folder, or its files do not fit.

    Cost: reads the file twice.
    """
    import transformers

    folder = Path(folder)
    if not (folder / "losparse.json").is_file():
        raise ValueError(f"folder {folder} has no losparse.json: it is not of a finished training")
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    model = getattr(transformers, config.architectures[0])(config)
    return losparse.load(model, folder / "model.safetensors").eval()


def _rows(recipe: FineTuning, data: str | Path | None, split: str) -> Any:
    if data is None:
        name, configuration = recipe.data_path
        return hub_dataset(name, configuration, split=split)
    file = Path(data) / f"{'train' if split == 'train' else 'validation'}.jsonl"
    if not file.is_file():
        raise ValueError(f"there is no {file}")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line]


def _collator(recipe: FineTuning, tokenizer: Any, model: nn.Module) -> Any:
    from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

    if recipe.kind == "summaries":
        return DataCollatorForSeq2Seq(tokenizer, model)
    return DataCollatorWithPadding(tokenizer)


def _score(recipe: FineTuning) -> Any:
    """Of predictions, for ``Trainer``; ``None`` where there is only a loss."""

    def score(found: Any) -> dict[str, float]:
        outputs, targets = found.predictions, found.label_ids
        if recipe.kind == "answers":
            ends = [
                logits.argmax(-1) == where for logits, where in zip(outputs, targets, strict=True)
            ]
            return {"score": float((ends[0] & ends[1]).mean())}
        if recipe.labels == 1:
            return {"score": float(np.corrcoef(np.ravel(outputs), np.ravel(targets))[0, 1])}
        return {"score": float((outputs.argmax(-1) == targets).mean())}

    return None if recipe.kind == "summaries" else score


def main() -> None:
    """``python -m examples.losparse_recipes``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", choices=[*RECIPES])
    parser.add_argument("--out", required=True)
    parser.add_argument("--model", help="another model: hub name or folder")
    parser.add_argument("--data", help="folder with train.jsonl and validation.jsonl")
    parser.add_argument("--mode", choices=losparse.MODES, default="losparse")
    parser.add_argument("--student", help="folder of a pruned model that learns from --teacher")
    parser.add_argument("--teacher", help="dense model of the task: hub name or folder")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    if (args.student is None) != (args.teacher is None):
        parser.error("--student and --teacher go together")
    if args.student is not None and (args.model, args.mode) != (None, "losparse"):
        parser.error("--model and --mode have no effect with --student, which is stored")
    shared = {"data": args.data, "use_cpu": args.cpu, "bf16": args.bf16}
    try:
        if args.student is not None:
            given = {"student": args.student, "teacher": args.teacher}
            found = distil(args.recipe, args.out, **given, **shared)
        else:
            given = {"model": args.model, "mode": args.mode}
            found = fine_tune(args.recipe, args.out, **given, **shared)
    except (ValueError, RuntimeError) as error:
        parser.exit(1, f"error: {error}\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

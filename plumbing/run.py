"""One training run: folder, log, progress bar and signals. A Run never calls a script's code."""

import json
import os
import shutil
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from plumbing.checkpoints import (compare_settings, load_checkpoint, one_line_failure,
                                  read_settings, save_checkpoint, write_model)
from plumbing.data import batches
from plumbing.errors import one_line, require, stop
from plumbing.flags import SystemArgs
from plumbing.processes import gather, is_first, rank_and_world_size, sum_over_ranks
from plumbing.report import print_evaluations, table, warn_if_collapsed
from plumbing.rewards import as_text

SHOWN = {"objective/scores": "score", "objective/kl": "kl", "rollout/length": "length",
         "loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin",
         "eval/accuracy": "accuracy"}  # after the progress bar


class Run:
    """Folder, log, progress bar, state and checkpoints of one run. The loop stays in the script.

        run = Run(__file__, args, tokenizer, policy=(policy, optimizer, scheduler))
        for examples in run.updates(train, args.prompts_per_step):
            run.check_finite(examples, loss=loss)      # before optimizer.step()
            run.log(metrics, samples=len(batch))
            run.checkpoint()                           # if due; also exits after Ctrl-C or SIGTERM
        run.finish(test)

    `run.state` is saved with every checkpoint: step, samples, seconds, threads, and what a script
    adds (numbers, tensors, plain containers). With torchrun, only the first process writes files;
    `run.writer` is None in the others.
    """

    def __init__(self, script, args, tokenizer, **trained):
        """Create the run folder, or reopen that of --resume.

        Args: script (__file__); args; tokenizer; trained (name=(model, optimizer, scheduler): what
        checkpoints save and restore).
        """
        self.name, self.args, self.tokenizer = Path(script).stem, args, tokenizer
        self.trained = trained
        self.state = {"step": 0, "samples": 0, "seconds": 0.0, "threads": torch.get_num_threads()}
        self.shown = {}  # after the progress bar
        settings = {"script": self.name, **asdict(args), "resume": None,
                    "nproc_per_node": rank_and_world_size()[1]}
        if args.resume:
            self.folder = Path(args.resume)
            self.restore(settings)
        else:
            name = f"{self.name}-seed{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
            self.folder = Path(gather(args.output or f"runs/{name}")[0])  # by the first one's clock
        self.writer = self.open_log(settings) if is_first() else None
        self.signals = []  # Ctrl-C or SIGTERM, once one has come

    def restore(self, settings):
        """Take up the last checkpoint of the run in self.folder, if it is the same run."""
        old = read_settings(self.folder)
        system = {field.name for field in fields(SystemArgs)}
        compare_settings(self.folder, old, settings, system | {"num_updates", "nproc_per_node"})
        self.state |= load_checkpoint(self.folder, self.trained)
        if "OMP_NUM_THREADS" not in os.environ:  # sums depend on it
            torch.set_num_threads(self.state["threads"])
        more = self.args.num_updates
        require(more > self.step or more == old["num_updates"],
                f"--num-updates {more}: the run in {self.folder} has already made {self.step}; "
                "give more")

    def open_log(self, settings):
        """Write args.json and open TensorBoard's writer."""
        try:
            reopened = bool(self.args.output or self.args.resume)
            self.folder.mkdir(parents=True, exist_ok=reopened)
            (self.folder / "args.json.new").write_text(json.dumps(settings, indent=2) + "\n")
            (self.folder / "args.json.new").rename(self.folder / "args.json")
        except OSError as error:
            stop(f"--output {self.folder}: cannot be created ({one_line(error)}); choose another "
                 "folder")
        # Points logged after the checkpoint that a run resumes from would appear twice:
        # TensorBoard drops them.
        writer = SummaryWriter(self.folder, purge_step=self.step + 1 if self.step else None)
        if not self.step:
            writer.add_text("hyperparameters", table(["flag", "value"], settings.items()))
        print(f"resuming after update {self.step}" if self.step else
              f"logs and model go to {self.folder}")
        return writer

    @property
    def step(self):
        """The number of the current update, from 1; 0 before the first one."""
        return self.state["step"]

    def updates(self, dataset, size):
        """Yield `size` rows (dict of columns) per update, up to --num-updates.

        A resumed run starts where it stopped. Meanwhile, Ctrl-C and SIGTERM save and exit; however
        the loop ends, they do afterwards what they did before.
        """
        bar = tqdm(range(self.step, self.args.num_updates), desc=self.name, unit="update",
                   disable=self.writer is None)
        with caught(self.signals):
            for _, examples in zip(bar, batches(dataset, size, self.args.seed, self.step)):
                self.start = time.perf_counter()
                self.state["step"] += 1
                yield examples
                bar.set_postfix(self.shown, refresh=False)

    def check_finite(self, examples, **values):
        """Exit before a NaN or infinity reaches the weights, and save the prompts it came from.

        Args: examples (of this update; their B prompts have N = B * k rows); values (numbers, or
        tensors (N,) and (N, T)). Writes not_finite.json to the run folder.
        """
        prompts = examples.get("prompt", [])
        for name, value in values.items():
            value = torch.as_tensor(value)
            if torch.isfinite(value).all():
                continue
            if value.ndim and prompts:
                rows = ~torch.isfinite(value).reshape(len(prompts), -1).all(1)  # (B,)
                prompts = [prompt for prompt, bad in zip(prompts, rows.tolist()) if bad]
            if self.writer:
                found = {"update": self.step, "not finite": name, "prompts": prompts}
                text = json.dumps(found, indent=2, ensure_ascii=False)
                (self.folder / "not_finite.json").write_text(text + "\n", "utf-8")
            stop(f"update {self.step}: {name} is not finite ({float(value.float().sum())}); the "
                 f"checkpoints in {self.folder} are from before this update, and not_finite.json "
                 "lists its prompts; try a smaller --lr or --max-grad-norm, and check the rewards",
                 code=1)

    def log(self, metrics, samples=0, tokens=0):
        """Log metrics (dict name -> number) to TensorBoard, and some of them after the bar.

        Args: metrics; samples and tokens (how many this update generated, for the time/ metrics).
        """
        if samples:
            elapsed = time.perf_counter() - self.start
            self.state["samples"] += samples
            self.state["seconds"] += elapsed
            metrics = metrics | {"time/samples": self.state["samples"],
                                 "time/seconds": self.state["seconds"]}
            metrics |= {"time/tokens_per_second": tokens / elapsed} if tokens else {}
        with one_line_failure("log"):
            for name, value in metrics.items() if self.writer else []:
                self.writer.add_scalar(name, float(value), self.step)
        self.shown |= {short: f"{float(metrics[name]):z.2f}" for name, short in SHOWN.items()
                       if name in metrics}
        if "rollout/eos_rate" in metrics:
            warn_if_collapsed(self.state, metrics, self.args.max_new_tokens)

    def evaluation_is_due(self):
        """Whether to evaluate now: every --eval-every updates, and after the last one."""
        every = self.args.eval_every
        return self.step == self.args.num_updates or (every > 0 and self.step % every == 0)

    def log_evaluation(self, evaluation):
        """Log the means of what `evaluate` returns; the first and last one make the final table."""
        self.check_finite({}, kl=evaluation[0]["kl"].mean())
        self.state.setdefault("before", evaluation)
        self.state["after"] = evaluation
        self.log({f"eval/{name}": value.nanmean() for name, value in evaluation[0].items()})

    def log_samples(self, examples, batch, scores, kl, advantages, rows=8):
        """Log a rollout's first responses as a table. Of advantages (N, T), the first is shown."""
        if not self.writer:
            return
        k = len(batch) // len(examples["prompt"])
        advantages = advantages if advantages.ndim == 1 else advantages[:, 0]
        numbers = torch.stack([scores, kl.sum(1), advantages], 1).tolist()  # N of 3
        cells = []
        for row in range(min(rows, len(batch))):
            ids = batch.responses[row][batch.response_mask[row]]
            cells.append([as_text(examples["prompt"][row // k]),
                          self.tokenizer.decode(ids, skip_special_tokens=True),
                          *(f"{number:.2f}" for number in numbers[row])])
        header = ["prompt", "response", "score", "KL", "advantage"]
        self.writer.add_text("samples", table(header, cells), self.step)

    def save_model(self, model):
        """Save model/ for from_pretrained; the old one stays until the new one is complete."""
        folder, new, old = (self.folder / name for name in ("model", "model.new", "model.old"))
        with one_line_failure(f"model {folder}", new):
            write_model(new, model, self.tokenizer)
            if self.writer:
                shutil.rmtree(old, ignore_errors=True)
                if folder.exists():
                    folder.rename(old)
                new.rename(folder)
                shutil.rmtree(old, ignore_errors=True)

    def checkpoint(self):
        """Save everything needed to resume: when it is due, at the end, and after a signal."""
        args, asked = self.args, sum_over_ranks(len(self.signals))
        last, every = self.step == args.num_updates, args.save_every
        if not (asked or last or (every and self.step % every == 0)):
            return
        if asked and not self.signals:  # another process has one
            self.signals.append(signal.SIGTERM)
        if asked and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it when the first ends
        if self.writer:
            self.writer.flush()
        save_checkpoint(self.folder, self.step, args.keep, self.state, self.trained, self.tokenizer)
        if asked and not last:
            self.stop_early()

    def stop_early(self):
        """After a signal, once a checkpoint is saved: print what resumes the run, and exit."""
        if self.writer:
            self.writer.close()
            size = rank_and_world_size()[1]
            launch = f"torchrun --nproc-per-node {size}" if dist.is_initialized() else "python"
            tqdm.write(f"stopped after update {self.step}; to resume: {launch} {self.name}.py "
                       f"--resume {self.folder}")
        if dist.is_initialized():
            dist.barrier()  # otherwise torchrun would end the first process while it is writing
        raise SystemExit(128 + self.signals[0])

    def finish(self, test=None):
        """Close the log, and print the first and last evaluation, if there is a `test` split."""
        if self.writer:
            self.writer.close()
        if self.writer is None or test is None:
            return
        found = print_evaluations(test[0]["prompt"], self.state["before"], self.state["after"])
        (self.folder / "evaluation.json").write_text(json.dumps(found, indent=2) + "\n")
        print(f"\nthe policy is in {self.folder}/model; to see the curves: tensorboard --logdir "
              f"{self.folder.parent}")


@contextmanager
def caught(signals):
    """Within this, the first Ctrl-C or SIGTERM is noted in the list `signals`.

    A second one does what it did before: it exits, or in a notebook raises KeyboardInterrupt.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread gets signals
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def note(number, frame):
        signals.append(number)
        restore()
        os.write(2, b"\nsaving a checkpoint and exiting after this update; press Ctrl-C again to "
                    b"quit now\n")

    for number in before:
        signal.signal(number, note)
    try:
        yield
    finally:
        if not (signals and dist.is_initialized()):  # then torchrun's SIGTERM is still to come
            restore()

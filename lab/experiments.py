"""The papers' experiments, as data for lab/papers.py: claims, commands, and what is drawn."""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

COLUMNS = ("score", "final score", "final gold", "final kl", "final length")


class Claim(NamedTuple):
    """A number is above `least`: the metric of some arms, less that of others."""

    text: str  # the claim in words
    metric: str  # see results.measure
    more: tuple[str, ...]
    less: tuple[str, ...] = ()
    least: float = 0.0


@dataclass
class Experiment:
    title: str
    source: str  # paper and figure
    arms: dict[str, str]  # label -> command; the learning rate is filled in unless it is given
    claims: list[Claim]
    panels: list[tuple[str, str]]  # x and y of each part of the picture; x "" for one point per arm
    columns: tuple[str, ...] = COLUMNS  # of the table
    seeds: range = range(1, 21)
    tax: bool = False  # whether evaluate.py measures the trained policies
    lag: bool = False  # whether the KL that the policy moves during each rollout's use is measured
    # Where a number is varied: its name, and label -> (curve, number). Pictures then show each
    # curve's numbers against it.
    varied: str = ""
    points: dict[str, tuple[str, float]] = field(default_factory=dict)
    tuned: bool = False  # whether each algorithm has its own learning rate, or all the common one


COMMON = "1e-4"  # the learning rate where a command has none
RATES = ("2.5e-5", "5e-5", "1e-4", "3e-4", "6e-4", "1e-3", "3e-3")
RUN = "--num-updates 60 --eval-every 20"
K4, K1 = f"--prompts-per-step 4 {RUN}", f"--prompts-per-step 16 {RUN}"  # 16 responses per update
PPO = "ppo.py --value-clip inf --minibatches 2"
# A command, and what it takes to generate 16 responses per update. Longer commands have its rate.
TUNED = {
    "rloo.py": K4,
    "raft.py": K4,
    "grpo.py": K4,
    "gspo.py": K4,
    "cispo.py": K4,
    "dapo.py": K4,
    "reinforce_pp.py": K4,
    "reinforce_pp_baseline.py": K4,
    "reinforce.py": K1,
    "reinforce.py --baseline none": K1,
    "remax.py": f"--prompts-per-step 8 {RUN}",
    "vanilla_pg.py": K1,
    PPO: K1,
    "dpo.py": f"--batch-size 8 {RUN}",
}
BASE = {name: f"{name} {size}" for name, size in TUNED.items()}


def budget(name):
    """960 responses again, but 4 prompts (or pairs) to an update, of 16, 8 or 4 responses."""
    updates = {K4: 60, K1: 240}.get(TUNED[name], 120)
    size = "--batch-size 4" if name == "dpo.py" else "--prompts-per-step 4"
    return f"{name} {size} --num-updates {updates} --eval-every {updates // 4}"


RLOO4, RAFT4 = {"RLOO, k 4": BASE["rloo.py"]}, {"RAFT, k 4": BASE["raft.py"]}
# As many prompts per step, half the responses.
K2 = "--k 2 --prompts-per-step 4 --num-updates 120 --eval-every 20"
RLOO2, RAFT2 = {"RLOO, k 2": f"rloo.py {K2}"}, {"RAFT, k 2": f"raft.py {K2}"}
REINFORCE = {"REINFORCE, baseline": BASE["reinforce.py"]}
NONE = {"REINFORCE, no baseline": BASE["reinforce.py --baseline none"]}
VANILLA = {"vanilla PG": BASE["vanilla_pg.py"]}
PPO95 = {"PPO, λ 0.95": f"{BASE[PPO]} --lam 0.95"}
ONE_STEP = "ppo.py --value-clip inf --minibatches 1"
PPO_ONE = {"PPO, λ 0.95, one step": f"{ONE_STEP} {K1} --lam 0.95 --lr 1e-4"}
REMAX = {"ReMax": BASE["remax.py"]}
PLUS = {"REINFORCE++": BASE["reinforce_pp.py"]}
PLUS_BASELINE = {"REINFORCE++-baseline": BASE["reinforce_pp_baseline.py"]}
GRPO = {"GRPO": BASE["grpo.py"]}
DPO = {"DPO": BASE["dpo.py"]}
LAMBDAS = {f"PPO, λ {lam}": f"{BASE[PPO]} --lam {lam}" for lam in ("0", "0.5", "0.95", "1")}

SHORT = "--k 2 --prompts-per-step 8 --num-updates 60 --eval-every 20"
BETAS = ("0.1", "0.25", "0.5", "1.0")
STD = 0.75  # of the scores of the SFT policy's responses
SIGMAS = (0, 1, 3, 5)

FREE = "--beta 0 --lr 4e-4 --num-updates 100 --eval-every 10"  # no KL penalty, and larger steps
SMALL = "--lr 1e-3 --num-updates 80 --eval-every 20"  # 8 responses per update, and large steps
MATH = ("--model tasks/mini_math-sft --reward tasks/mini_math.py:accuracy "
        "--dataset tasks/mini_math.py:prompts --temperature 1 --max-new-tokens 12 --beta 0 "
        "--lr 1e-4 --num-updates 60 --eval-every 20 --eval-prompts 512")


# Several optimizer steps per rollout of 64 responses, without a KL penalty, at a rate at which the
# policy moves away from the one that sampled.
STALE = "--prompts-per-step 16 --num-updates 15 --eval-every 5 --beta 0 --lr 3e-4"
MATH5 = ("--model tasks/mini_math-sft --reward tasks/mini_math.py:accuracy "
         "--dataset tasks/mini_math.py:prompts --temperature 1 --max-new-tokens 5 "
         "--eval-prompts 512")
STALE_MATH = ("--prompts-per-step 16 --num-updates 15 --eval-every 5 --beta 0 --lr 1e-3 "
              f"{MATH5}")
BINARY = ("maxrl.py", "rloo.py", "grpo.py")  # on scores of 0 and 1
REUSED = {"RLOO, no ratio": "lab/reuse.py --ratio none",
          "RLOO, token ratio": "lab/reuse.py --ratio token",
          "RLOO, clipped": "lab/reuse.py --ratio clip",
          "RLOO, sequence ratio": "lab/reuse.py --ratio sequence",
          "PPO": "ppo.py --k 4 --value-clip inf",
          "REINFORCE++": "reinforce_pp.py",
          "GRPO": "grpo.py",
          "GSPO": "gspo.py",
          "CISPO": "cispo.py",
          "DAPO": "dapo.py"}


def stale(title, setting, commands, gold=(), dapo="DAPO"):
    """The experiment of several steps per rollout.

    Args: title; setting (flags of all); commands (name -> command); gold (metrics of that reward);
    dapo (the name of the DAPO that has as many responses as the others).
    """
    points = {f"{name}, {steps} steps": (name, steps) for name in commands for steps in (1, 4, 16)}
    # With one step every ratio is 1, and the four forms of RLOO are one.
    arms = {label: f"{commands['RLOO, no ratio' if 'RLOO' in name and steps == 1 else name]} "
                   f"{setting} --minibatches {steps}" for label, (name, steps) in points.items()}

    def above(metric, a, b, steps):
        gold_or_not = " (gold)" if metric in gold else ""
        return Claim(f"{steps} steps: {a} above {b}{gold_or_not}", metric, (f"{a}, {steps} steps",),
                     (f"{b}, {steps} steps",))

    orders = [("RLOO, token ratio", "RLOO, no ratio"), ("RLOO, clipped", "RLOO, token ratio"),
              ("RLOO, clipped", "RLOO, no ratio"), ("RLOO, clipped", "RLOO, sequence ratio"),
              ("RLOO, sequence ratio", "RLOO, token ratio"),
              ("GSPO", "GRPO"), ("CISPO", "GRPO"), (dapo, "GRPO"), ("PPO", "GRPO"),
              ("REINFORCE++", "GRPO")]
    return Experiment(
        title, "GSPO, MiniMax-M1 (CISPO), DAPO and PPO; ours", arms,
        [above(metric, a, b, steps)
         for metric in ("score", *gold) for steps in (4, 16) for a, b in orders],
        [("", metric) for metric in ("score", *gold, "final kl", "lag")],
        ("score", "final score", *gold, "final kl", "final length", "lag", "clipfrac"),
        lag=True, varied="optimizer steps per rollout", points=points,
    )


def pairs(metric, labels, text):
    """A claim for each two neighbours of `labels`, the first being above the second."""
    return [Claim(text.format(a, b), metric, (a,), (b,)) for a, b in zip(labels, labels[1:])]


EXPERIMENTS = {
    "lr": Experiment(
        "The learning rate of each algorithm", "ours, on seeds that are not used again",
        {f"{name} --lr {rate}": f"{BASE[name]} --num-updates 40 --lr {rate}"
         for name in TUNED for rate in RATES},
        [], [("", "score"), ("", "final gold"), ("", "final kl")],
        ("score", "final score", "final gold", "final kl", "final length"),
        seeds=range(101, 106), varied="learning rate",
        points={f"{name} --lr {rate}": (name, float(rate)) for name in TUNED for rate in RATES},
    ),
    "lr_math": Experiment(
        "The learning rate of MaxRL and its relatives (mini math)",
        "ours, on seeds that are not used again",
        {f"{name} --lr {rate}": f"{name} {K4} --num-updates 40 {MATH5} --beta 0 --lr {rate}"
         for name in BINARY for rate in RATES},
        [], [("", "score"), ("", "final score"), ("", "final kl")],
        ("score", "final score", "final kl", "final length"),
        seeds=range(101, 106), varied="learning rate",
        points={f"{name} --lr {rate}": (name, float(rate)) for name in BINARY for rate in RATES},
    ),
    "budget": Experiment(
        "Equal responses, equal updates, equal CPU time", "ours",
        {name: budget(name) for name in TUNED},
        [], [("samples", "score"), ("updates", "score"), ("cpu", "score")],
        ("score", "final score", "final gold", "final kl", "seconds"),
    ),
    "stale": stale("Several steps per rollout (mini TL;DR)", STALE, REUSED, ("final gold",)),
    # Where many groups have no differences, DAPO samples up to four times as many responses.
    "stale_math": stale("Several steps per rollout (mini math)", STALE_MATH,
                        REUSED | {"DAPO, one round": "dapo.py --max-rounds 1"},
                        dapo="DAPO, one round"),
    "fig2": Experiment(
        "REINFORCE, RLOO, vanilla PG and PPO", "Back to Basics, figure 2",
        RLOO4 | REINFORCE | VANILLA | PPO95 | PPO_ONE,
        [
            Claim("RLOO above PPO", "score", tuple(RLOO4), tuple(PPO95)),
            Claim("RLOO above PPO with one step per rollout, as RLOO has", "score", tuple(RLOO4),
                  tuple(PPO_ONE)),
            Claim("RLOO above vanilla PG", "score", tuple(RLOO4), tuple(VANILLA)),
            Claim("REINFORCE with a baseline above PPO", "score", tuple(REINFORCE), tuple(PPO95)),
            Claim("REINFORCE with a baseline above PPO with one step per rollout", "score",
                  tuple(REINFORCE), tuple(PPO_ONE)),
            Claim("REINFORCE with a baseline above vanilla PG", "score", tuple(REINFORCE),
                  tuple(VANILLA)),
            Claim("vanilla PG above PPO", "score", tuple(VANILLA), tuple(PPO95)),
            Claim("vanilla PG above PPO with one step per rollout", "score", tuple(VANILLA),
                  tuple(PPO_ONE)),
            Claim("RLOO above REINFORCE with a baseline", "score", tuple(RLOO4), tuple(REINFORCE)),
            Claim("at the same KL (1), RLOO above PPO", "score at KL 1", tuple(RLOO4),
                  tuple(PPO95)),
            Claim("at the same KL (1), RLOO above REINFORCE", "score at KL 1", tuple(RLOO4),
                  tuple(REINFORCE)),
        ],
        [("updates", "score"), ("updates", "gold"), ("kl", "score")],
    ),
    "noisy": Experiment(
        "Large steps on 8 responses", "ours: where the estimators differ",
        {
            "RLOO, k 4": f"rloo.py --prompts-per-step 2 {SMALL}",
            "RAFT, k 4": f"raft.py --prompts-per-step 2 {SMALL}",
            "ReMax": f"remax.py --prompts-per-step 4 {SMALL}",
            "REINFORCE, baseline": f"reinforce.py --prompts-per-step 8 {SMALL}",
            "vanilla PG": f"vanilla_pg.py --prompts-per-step 8 {SMALL}",
            "PPO, λ 0.95": f"{ONE_STEP} --prompts-per-step 8 {SMALL}",
        },
        [
            Claim("RLOO above REINFORCE with a baseline (gold)", "gold", ("RLOO, k 4",),
                  ("REINFORCE, baseline",)),
            Claim("RLOO above RAFT (gold)", "gold", ("RLOO, k 4",), ("RAFT, k 4",)),
            Claim("RLOO above ReMax (gold)", "gold", ("RLOO, k 4",), ("ReMax",)),
            Claim("RLOO above vanilla PG (gold)", "gold", ("RLOO, k 4",), ("vanilla PG",)),
            Claim("RLOO above PPO (gold)", "gold", ("RLOO, k 4",), ("PPO, λ 0.95",)),
            Claim("REINFORCE with a baseline strays further than RLOO (KL)", "kl",
                  ("REINFORCE, baseline",), ("RLOO, k 4",)),
        ],
        [("updates", "score"), ("updates", "gold"), ("updates", "kl")],
        ("score", "gold", "final score", "final gold", "final kl", "final length"),
    ),
    "fig3": Experiment(
        "RLOO and RAFT, against steps and against samples", "Back to Basics, figures 3 and 4",
        RLOO4 | RLOO2 | RAFT4 | RAFT2,
        [
            Claim("RLOO above RAFT at k 4", "score", ("RLOO, k 4",), ("RAFT, k 4",)),
            Claim("RLOO above RAFT at k 2", "score", ("RLOO, k 2",), ("RAFT, k 2",)),
            Claim("RLOO k 2 above RAFT k 4 at equal responses", "score each 320", ("RLOO, k 2",),
                  ("RAFT, k 4",)),
            Claim("RLOO k 2 above RAFT k 4 at equal steps", "score at update 60", ("RLOO, k 2",),
                  ("RAFT, k 4",)),
            Claim("at the same KL (1), RLOO above RAFT at k 4", "score at KL 1", ("RLOO, k 4",),
                  ("RAFT, k 4",)),
        ],
        [("updates", "score"), ("samples", "score"), ("samples", "gold")],
        ("score", "score each 320", "final score", "final gold", "final kl", "final length"),
    ),
    "fig1": Experiment(
        "PPO's λ", "Back to Basics, figure 1 and section 3.1",
        LAMBDAS,
        pairs("score", list(LAMBDAS)[::-1], "{} above {}"),
        [("updates", "score"), ("updates", "gold")],
    ),
    "clip": Experiment(
        "Clipping off, and the ratio off", "Back to Basics, figure 1 and section 3.2",
        {"PPO, λ 1": LAMBDAS["PPO, λ 1"],
         "without clipping": f"{LAMBDAS['PPO, λ 1']} --clip inf",
         "without ratio (vanilla PG)": VANILLA["vanilla PG"],
         "PPO, λ 1, lr 1e-3": f"{LAMBDAS['PPO, λ 1']} --lr 1e-3",
         "without clipping, lr 1e-3": f"{LAMBDAS['PPO, λ 1']} --lr 1e-3 --clip inf"},
        [
            Claim("less than 5% of the tokens are clipped", "clipfrac", (), ("PPO, λ 1",), -0.05),
            Claim("without clipping above PPO", "score", ("without clipping",), ("PPO, λ 1",)),
            Claim("without the ratio above PPO", "score", ("without ratio (vanilla PG)",),
                  ("PPO, λ 1",)),
            Claim("less than 5% of the tokens are clipped at 10 times the learning rate",
                  "clipfrac", (), ("PPO, λ 1, lr 1e-3",), -0.05),
            Claim("without clipping above PPO at 10 times the learning rate", "score",
                  ("without clipping, lr 1e-3",), ("PPO, λ 1, lr 1e-3",)),
            Claim("without clipping above PPO at 10 times the learning rate (gold)", "gold",
                  ("without clipping, lr 1e-3",), ("PPO, λ 1, lr 1e-3",)),
        ],
        [("updates", "score"), ("updates", "gold")],
        ("score", "gold", "final score", "final gold", "final kl", "clipfrac"),
    ),
    "remax": Experiment(
        "ReMax: the greedy baseline, and what it saves", "ReMax, sections 4 and 5",
        REMAX | {"ReMax, twice the budget": f"remax.py --prompts-per-step 16 {RUN}"}
        | NONE | PPO95,
        [
            Claim("ReMax above REINFORCE without a baseline", "score", ("ReMax",),
                  ("REINFORCE, no baseline",)),
            Claim("ReMax above REINFORCE without a baseline (gold)", "gold", ("ReMax",),
                  ("REINFORCE, no baseline",)),
            Claim("ReMax above REINFORCE without a baseline, greedy responses not counted", "score",
                  ("ReMax, twice the budget",), ("REINFORCE, no baseline",)),
            Claim("ReMax at least 1.6 times as fast as PPO (log of CPU s per update)",
                  "log seconds", tuple(PPO95), ("ReMax",), 0.47),
            Claim("ReMax takes less memory than PPO (MB)", "peak_mb", tuple(PPO95), ("ReMax",)),
        ],
        [("samples", "score"), ("samples", "gold"), ("", "seconds")],
        ("score", "final score", "final gold", "final kl", "seconds", "peak_mb"),
    ),
    "table1": Experiment(
        "Win rates", "Back to Basics, table 1",
        RLOO4 | RLOO2 | RAFT4 | RAFT2 | REINFORCE | VANILLA | PPO95 | DPO,
        pairs("win_rate", [*RLOO4, *RAFT4, *REINFORCE, *VANILLA, *PPO95, *DPO],
              "win rate: {} above {}")
        + [Claim("win rate: RLOO, k 4 above PPO, λ 0.95", "win_rate", tuple(RLOO4), tuple(PPO95)),
           Claim("win rate: RLOO, k 4 above DPO", "win_rate", tuple(RLOO4), tuple(DPO)),
           Claim("win rate: RLOO, k 2 above RAFT, k 2", "win_rate", tuple(RLOO2), tuple(RAFT2))],
        [("", "win_rate"), ("", "gold"), ("", "kl")],
        ("win_rate", "score", "gold", "kl"),
        tax=True,
    ),
    "table2": Experiment(
        "The alignment tax", "Back to Basics, table 2",
        RLOO4 | RLOO2 | RAFT4 | RAFT2 | REINFORCE | VANILLA | PPO95 | DPO,
        [
            Claim("perplexity: PPO above RLOO", "perplexity", tuple(PPO95), tuple(RLOO4)),
            Claim("perplexity: vanilla PG above RLOO", "perplexity", tuple(VANILLA), tuple(RLOO4)),
            Claim("perplexity: PPO above REINFORCE", "perplexity", tuple(PPO95), tuple(REINFORCE)),
            Claim("perplexity: PPO above RAFT", "perplexity", tuple(PPO95), tuple(RAFT4)),
            Claim("length: DPO's responses longer than RLOO's", "length", tuple(DPO), tuple(RLOO4)),
            Claim("length: PPO's responses shorter than RLOO's", "length", tuple(RLOO4),
                  tuple(PPO95)),
            Claim("variance of the reward: RAFT above RLOO at k 4", "variance", tuple(RAFT4),
                  tuple(RLOO4)),
            Claim("variance of the reward: RAFT above RLOO at k 2", "variance", tuple(RAFT2),
                  tuple(RLOO2)),
            Claim("variance of the reward: vanilla PG above REINFORCE", "variance", tuple(VANILLA),
                  tuple(REINFORCE)),
        ],
        [("", "length"), ("", "perplexity"), ("", "variance")],
        ("length", "perplexity", "diversity_1", "diversity_2", "variance"),
        tax=True,
    ),
    "gao": Experiment(
        "Over-optimization: proxy and gold reward against √KL",
        "Gao et al. 2023; left open in Back to Basics, section 7",
        {
            "RLOO, k 4": f"rloo.py --prompts-per-step 4 {FREE}",
            "RAFT, k 4": f"raft.py --prompts-per-step 4 {FREE}",
            "REINFORCE++": f"reinforce_pp.py --prompts-per-step 4 {FREE}",
            "PPO, λ 0.95": f"{PPO} --prompts-per-step 16 {FREE}",
        },
        [Claim(f"{name}: the gold reward ends below where it began", "growth of gold", (), (name,))
         for name in ("RLOO, k 4", "RAFT, k 4", "REINFORCE++", "PPO, λ 0.95")]
        + [Claim("at the same KL (5), RAFT's gold reward is above RLOO's", "gold at KL 5",
                 ("RAFT, k 4",), ("RLOO, k 4",)),
           Claim("at the same KL (5), RLOO's gold reward is above REINFORCE++'s", "gold at KL 5",
                 ("RLOO, k 4",), ("REINFORCE++",)),
           Claim("at the same KL (5), RLOO's gold reward is above PPO's", "gold at KL 5",
                 ("RLOO, k 4",), ("PPO, λ 0.95",))],
        [("√kl", "score"), ("√kl", "gold"), ("updates", "kl")],
        ("final score", "final gold", "fall of gold", "final kl", "final length"),
    ),
    "plus": Experiment(
        "REINFORCE++ and GRPO: reward per KL, growth of length", "REINFORCE++, experiments",
        {name: f"{command} --beta 0" for name, command in (PLUS | PLUS_BASELINE | GRPO).items()}
        | {"REINFORCE++, one step": f"{BASE['reinforce_pp.py']} --beta 0 --minibatches 1 "
                                    "--lr 1e-4"},
        [
            Claim("REINFORCE++ above GRPO at the same KL (1.5)", "score at KL 1.5",
                  ("REINFORCE++",), ("GRPO",)),
            Claim("REINFORCE++-baseline above GRPO at the same KL (1.5)", "score at KL 1.5",
                  ("REINFORCE++-baseline",), ("GRPO",)),
            Claim("REINFORCE++ above GRPO at the same responses", "score", ("REINFORCE++",),
                  ("GRPO",)),
            Claim("REINFORCE++ with one step per rollout, as GRPO has, above GRPO", "score",
                  ("REINFORCE++, one step",), ("GRPO",)),
            Claim("GRPO's responses grow more than REINFORCE++'s", "growth of length", ("GRPO",),
                  ("REINFORCE++",)),
        ],
        [("kl", "score"), ("updates", "score"), ("updates", "length")],
    ),
    "fig6": Experiment(
        "Noise on the reward", "Back to Basics, figure 6 and section 5.2.2",
        {f"{name}, σ {sigma}": f"{script} {SHORT} --reward-noise {sigma * STD}"
         for name, script in (("RLOO", "rloo.py"), ("RAFT", "raft.py")) for sigma in SIGMAS},
        [Claim(f"σ {sigma}: noise costs RAFT more than RLOO{when}", metric,
               ("RAFT, σ 0", f"RLOO, σ {sigma}"), (f"RAFT, σ {sigma}", "RLOO, σ 0"))
         for metric, when in (("score", ""), ("final score", ", last evaluation"))
         for sigma in SIGMAS[1:]]
        + [Claim(f"σ {sigma}: RLOO above RAFT", "score", (f"RLOO, σ {sigma}",),
                 (f"RAFT, σ {sigma}",))
           for sigma in SIGMAS],
        [("updates", "score"), ("updates", "gold")],
    ),
    "fig5": Experiment(
        "The weight of the KL penalty", "Back to Basics, figure 5 and section 5.2.2",
        {f"{name}, β {beta}": f"{script} {SHORT} --beta {beta}"
         for name, script in (("RLOO", "rloo.py"), ("RAFT", "raft.py")) for beta in BETAS},
        [Claim(f"RLOO's reward above RAFT's at β {beta}", "score", (f"RLOO, β {beta}",),
               (f"RAFT, β {beta}",))
         for beta in BETAS]
        + [Claim(f"RAFT's KL above RLOO's at β {beta}", "kl", (f"RAFT, β {beta}",),
                 (f"RLOO, β {beta}",))
           for beta in BETAS[1:]],
        [("updates", "score"), ("updates", "kl")],
    ),
    "rouge": Experiment(
        "ROUGE-L as the reward", "left open in Back to Basics, section 7",
        {"reward model": BASE["rloo.py"],
         "ROUGE-L": f"{BASE['rloo.py']} --reward tasks/rouge.py:rouge_l --beta 0.01"},
        [
            Claim("optimizing ROUGE-L raises it", "growth of score", ("ROUGE-L",)),
            Claim("optimizing ROUGE-L raises the gold reward", "growth of gold", ("ROUGE-L",)),
            Claim("the reward model raises the gold reward more", "growth of gold",
                  ("reward model",), ("ROUGE-L",)),
        ],
        [("updates", "gold"), ("kl", "gold"), ("updates", "length")],
    ),
    "length": Experiment(
        "GRPO's 1/length, on summaries", "Dr. GRPO, figure 5",
        {"GRPO": f"{BASE['grpo.py']} --beta 0",
         "GRPO, no 1/length": f"{BASE['grpo.py']} --beta 0 --no-length-mean"},
        [Claim("GRPO: responses grow more with 1/length than without", "growth of length",
               ("GRPO",), ("GRPO, no 1/length",))],
        [("updates", "length"), ("updates", "score")],
    ),
    "wrong": Experiment(
        "GRPO's 1/length, on wrong answers (mini math)", "Dr. GRPO, figure 5",
        {"GRPO": f"grpo.py {MATH}", "GRPO, no 1/length": f"grpo.py {MATH} --no-length-mean"},
        [
            Claim("GRPO: wrong answers end longer with 1/length than without", "wrong_length_after",
                  ("GRPO",), ("GRPO, no 1/length",)),
            Claim("GRPO: wrong answers grow with 1/length", "growth_of_wrong", ("GRPO",)),
        ],
        [("updates", "length"), ("updates", "score"), ("", "wrong_length_after")],
        ("score", "final score", "wrong_length_before", "wrong_length_after"),
    ),
}


COSTS = ("seconds", "log seconds", "peak_mb")  # what a run costs, at any learning rate


def own_rates(experiment):
    """The same experiment with each algorithm's own learning rate.

    Without the arms whose commands give a rate, which say what happens at that one; without time
    and memory; and without claims at a KL, which these policies pass before the first evaluation.
    """
    arms = {label: command for label, command in experiment.arms.items() if "--lr " not in command}
    claims = [claim for claim in experiment.claims if {*claim.more, *claim.less} <= arms.keys()
              and claim.metric not in COSTS and " at KL " not in claim.metric]
    return replace(experiment, arms=arms, claims=claims, tuned=True,
                   panels=[panel for panel in experiment.panels if panel[1] not in COSTS],
                   columns=tuple(name for name in experiment.columns if name not in COSTS),
                   title=f"{experiment.title}, each at its own rate")


EXPERIMENTS |= {f"{name}_tuned": own_rates(experiment) for name, experiment in EXPERIMENTS.items()
                if any("--lr " not in command for command in experiment.arms.values())}

"""What a run needs besides its algorithm, by room. Scripts import from here and from common.py.

Not needed to understand an algorithm. Nothing in here calls a script's code, or common.py's.
"""

from plumbing.chat import prompt_tokens, reply_tokens
from plumbing.checkpoints import checkpoints, read_settings
from plumbing.data import batches, load_rows
from plumbing.errors import one_line, require, stop
from plumbing.files import find, load_function, load_module
from plumbing.flags import (Between, Count, CountOrZero, DataArgs, EvaluationArgs, Limit,
                            NotNegative, Positive, Range, RunArgs, Seed, SystemArgs, check_ranges,
                            get_scheduler, parse, setup)
from plumbing.models import (eos_ids, load_classifier, load_critic, load_model, load_policy,
                             load_reference, load_tokenizer)
from plumbing.processes import (clip_gradients, equal_share, everywhere, gather, is_first,
                                isolated_rng, leave, my_parts, own_rng, pick_device,
                                random_states, set_random_states, sum_gradients, sum_over_ranks)
from plumbing.rewards import (Reward, Rewards, as_text, call_function, find_gold, load_reward,
                              load_rewards, models_sharing_ids, own_ids, require_binary,
                              shares_ids, weighted_sum)
from plumbing.run import Run
from plumbing.sources import load_dataset
from plumbing.tryout import keeps_cache, try_out

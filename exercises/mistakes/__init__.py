"""The mistakes that people make: small functions, in one file for each part of the sheet.

Each returns what somebody who makes the mistake returns, and is mostly the right function with
other inputs. tests/test_exercises.py shows that no two look alike.
"""

from exercises.mistakes import masks, baselines, critics, relatives, newer
from exercises.mistakes.shared import MISTAKES

__all__ = ["MISTAKES", "masks", "baselines", "critics", "relatives", "newer"]

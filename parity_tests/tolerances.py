"""The tolerance table by the name that the tests have for it: `bytelm.tolerances`, which ships."""

from bytelm.tolerances import *  # noqa: F403

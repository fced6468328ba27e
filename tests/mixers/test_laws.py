"""Every law over every registered mixer: a newly registered one is tested unasked."""

from __future__ import annotations

import pytest

from lizardzoo.config import MIXERS
from lizardzoo.testing import LAWS, check_law

MIXING = [name for name in MIXERS if not MIXERS.get(name).keeps_softmax]


@pytest.mark.parametrize("name", MIXING)
@pytest.mark.parametrize("law", LAWS)
def test_law(law: str, name: str) -> None:
    check_law(LAWS[law], MIXERS.get(name))

"""The closed set of policy kinds, told apart by `kind`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from policies.fixed import FixedPolicy
from policies.goodput import GoodputPolicy
from policies.off import OffPolicy
from policies.threshold import ThresholdPolicy

Policy = Annotated[OffPolicy | FixedPolicy | ThresholdPolicy | GoodputPolicy, Field(discriminator="kind")]

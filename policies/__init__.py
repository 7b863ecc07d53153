"""Pure decisions: load, acceptance and cost in, draft depths out. Knows no torch, no Ray, no clock, no I/O."""

from policies.canary import Arm, CanaryRule, CanaryVerdict, in_canary, judge
from policies.cost import CostModel, CostTable
from policies.decision import OFF, Decision
from policies.drafts import Profile, bin_of, nodes_of
from policies.fixed import FixedPolicy
from policies.forecast import Forecast
from policies.gate import GateRule, Verdict
from policies.goodput import GoodputPolicy
from policies.kinds import Policy
from policies.knowledge import EVERYONE, Knowledge
from policies.load import Limits, Load, Mode, RequestView
from policies.off import OffPolicy
from policies.plan import Plan
from policies.step import StepSample
from policies.survival import DepthCounts, Survival, SurvivalCurve, pooled
from policies.telemetry import Telemetry
from policies.threshold import ThresholdPolicy, ThresholdStep

__all__ = [
    "EVERYONE",
    "OFF",
    "Arm",
    "CanaryRule",
    "CanaryVerdict",
    "CostModel",
    "CostTable",
    "Decision",
    "DepthCounts",
    "FixedPolicy",
    "Forecast",
    "GateRule",
    "GoodputPolicy",
    "Knowledge",
    "Limits",
    "Load",
    "Mode",
    "OffPolicy",
    "Plan",
    "Policy",
    "Profile",
    "RequestView",
    "StepSample",
    "Survival",
    "SurvivalCurve",
    "Telemetry",
    "ThresholdPolicy",
    "ThresholdStep",
    "Verdict",
    "bin_of",
    "in_canary",
    "judge",
    "nodes_of",
    "pooled",
]

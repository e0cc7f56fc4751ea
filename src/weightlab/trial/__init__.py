"""The fair-trial engine: same budget, same seeds, same data order, and an honest verdict."""

from typing import TYPE_CHECKING

from weightlab._lazy import exports

if TYPE_CHECKING:
    from weightlab.trial.arm import Arm, Callback, warmup_linear
    from weightlab.trial.profiles import performance_profile
    from weightlab.trial.result import ArmReport, Profile, TrialReport, Versus
    from weightlab.trial.spec import Job, RunResult, RunSpec
    from weightlab.trial.store import Store
    from weightlab.trial.trial import run_trial

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "Arm": ".arm",
        "ArmReport": ".result",
        "Callback": ".arm",
        "Job": ".spec",
        "Profile": ".result",
        "RunResult": ".spec",
        "RunSpec": ".spec",
        "Store": ".store",
        "TrialReport": ".result",
        "Versus": ".result",
        "performance_profile": ".profiles",
        "run_trial": ".trial",
        "warmup_linear": ".arm",
    },
)

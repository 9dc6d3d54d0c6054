"""Leapfrog's backend: a pool of processes, one per device, that evaluates a denoiser for ComfyUI.

The life of one denoise step, which is also the reading order:

0.  The sampler asks for an evaluation; ``rounds.py`` has others of steps to come under way, which it foresaw.
1.  ``nodes/`` hands the arguments of ``diffusion_model.forward`` to a :class:`SplitDenoiser` (``split_denoiser.py``) or
    :class:`LanesDenoiser` (``lanes_denoiser.py``), made from a frozen plan (``plan.py``) and a recipe; what both share
    is in ``denoiser.py``.
2.  Where the denoiser is to be cut, the ranks watch it run (``watching.py``, ``worker/models/trace.py``), ``units.py``
    says what a unit is and ``cutting.py`` where to cut. The schedule (``schedules/``, pure functions) says whether an
    evaluation is exact or asynchronous, or which rows go to which rank (``batching.py``).
3.  The tensors are written to shared memory (``tensors.py``) and one typed message (``protocol.py``) goes down each
    rank's channel (``channel.py``), for which both ends proved a secret (``handshake.py``).
4.  The pool (``pool.py``) waits for the replies under a deadline, notices ranks that die, and lets the caller cancel.
    ``supervisor.py`` gives it out, ``starting.py`` brings it up; processes are started and ended in ``launcher.py``.
5.  In a rank (``worker/rank.py``) the component or the whole denoiser runs with ComfyUI's own code; ranks exchange
    hidden states through torch.distributed (``worker/links.py``).
6.  The result comes back through shared memory; ``report.py`` keeps who did what when.

Ranks of other machines are lent by joiners there (``joining.py``); ``guests.py`` is the host's side of them, and
``courier.py`` carries the tensors that shared memory carries elsewhere.

Which plan to take is asked before all that: ``survey.py`` measures a denoiser on the ranks, ``adviser.py`` times every
plan by ``schedules/simulate.py``, and ``fidelity.py`` says how close such plans came to ComfyUI alone.

Importing this package starts nothing.
"""

from .denoiser import Patches
from .errors import LeapfrogError
from .lanes_denoiser import LanesDenoiser
from .own_code import OWN_PACKAGES, codes_named, thing_named, unwrapped
from .plan import LanesPlan, SplitPlan
from .protocol import Recipe
from .rounds import Rounds
from .split_denoiser import SplitDenoiser
from .starting import ComfyHost
from .survey import Survey, Surveyed

__all__ = [
    "OWN_PACKAGES",
    "ComfyHost",
    "LanesDenoiser",
    "LanesPlan",
    "LeapfrogError",
    "Patches",
    "Recipe",
    "Rounds",
    "SplitDenoiser",
    "SplitPlan",
    "Survey",
    "Surveyed",
    "codes_named",
    "thing_named",
    "unwrapped",
]

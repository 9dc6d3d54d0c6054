"""The doctor: ``python <pack>/parallel_backend --doctor``, a report on this machine to paste into a bug report.

Reading order: ``checkup.py`` (the sections in their order, the deadline), ``machine.py`` (versions, devices),
``choice.py`` (what the nodes would choose and why, environment variables), ``selftest.py`` (two ranks and the links
between them), ``comfyui.py`` (the nodes in a ComfyUI process of their own), ``sheet.py`` (how it is written).

It needs no GPU, has a deadline for all it does, leaves no process behind and prints neither user names nor home paths.
"""

"""How torch's threads wait for each other: asleep. Imported before torch is, for OpenMP looks once, when it is loaded.

Spinning is its default. Torch's threads would spin on the cores where those of `titans.native` compute: on two cores
a token then takes twice as long.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

"""Is a space fit for a configuration, and what would be tried first? python sweep_space.py SPACE CONFIG [a.b=c …]"""

import sys

from threestage.config import load
from threestage.sweeps.space import check_space, load_space, overrides
from threestage.sweeps.trials import propose

space, config = load_space(sys.argv[1]), load(sys.argv[2], sys.argv[3:])
check_space(space, config)  # InputError: the key, the value, the fix
params = propose(space, [], seed=0)
print(params and overrides(space, config, params))

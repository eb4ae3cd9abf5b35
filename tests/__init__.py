"""Tests run in two processes beside servers and ranks: a thread that waits for another one leaves its core to them."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command `tutelage` does, and before torch is loaded

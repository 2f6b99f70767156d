"""Who takes part in a run, and do they agree: devices, locks, signals, the watchdog."""

"""Programs that read a run or start one."""

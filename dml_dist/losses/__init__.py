"""Pure mathematics of the losses: functions of tensors and numbers, without a process group."""

"""The code behind the commands: options, data, checkpoints, ranks. It takes values and never imports train."""

"""What the commands share: options, data, checkpoints, ranks. It takes values, and never imports train."""

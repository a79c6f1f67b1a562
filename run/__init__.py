"""What a run needs around the method: flags, processes, the plan, its folder, its log."""

"""Arms x seeds in one command: curate, train, evaluate, report. The only place that knows all three packages."""

"""An experiment: variants, each with trials, over seeds and cases, on a task; its queue of runs, records and report."""

"""From findings to a verdict: settings, intervals, floors and the rules."""

"""Thinks and learns: plan, dual stream, pipeline and its schedule, replay, and double backward as the judge."""

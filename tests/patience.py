"""How long tests wait."""

#: Seconds after which a program that a test started counts as hung. What works takes a hundredth of it, and stays far
#: below it on a machine of two cores that several others use as well.
PATIENCE = 1800

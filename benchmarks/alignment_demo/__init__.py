"""The plan of docs/evidence.md, "What we will measure": does the demo model follow its captions better with PLADIS?"""

# of the plan, in the order in which they are measured: without guidance and at CFG 3; the student; the tuned CFG;
# robustness to noise
PARTS = ("fixed", "student", "tuned", "noise")
CAPTION_SEED = 2026
# the first of the captions to report on, for robustness to noise
ROBUSTNESS_CAPTIONS = 500

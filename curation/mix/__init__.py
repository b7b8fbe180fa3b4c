"""Mix: labels and token counts in, the content of every arm out. The only place that drops or repeats.

policy.py    what an arm may take: categories of documents, streams of them
budget.py    how far along each stream an arm-phase reads, so that it is exactly T tokens
arms.py      the rows of every shard
The definitions are in docs/mixing.md, with a worked example that tests/curation/mix follows.
"""

STAGE_VERSION = 1

"""Label: a language model reads documents and says how each portrays AI.

rubric.py    what is asked, as a versioned data file -> messages, JSON schema, a validated Label
windows.py   a long document -> the windows that the detector finds most telling; their labels -> one
backend.py   what a model behind any of the backends is to the rest: requests in, replies out
client.py    the backend for OpenAI-compatible endpoints: retries, deadlines, circuit breakers
cache.py     answers on disk, so that nothing is paid twice
work.py      documents -> label rows and quarantine rows, with counts that add up
"""

STAGE_VERSION = 1

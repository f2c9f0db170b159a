"""What a run costs, before it is paid for."""

CACHE = '~/.cache/mmjax/plan'  # where read-outs are kept

-- The trace that a caller has put the task into, as W3C Trace Context says it: goes with callbacks and events, and with spans.
ALTER TABLE tasks ADD COLUMN traceparent text;

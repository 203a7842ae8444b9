-- Which attempt has entered the vectors: an earlier one that was given up for dead, and wakes up, replaces nothing.
ALTER TABLE task_vectors ADD COLUMN attempt smallint NOT NULL DEFAULT 0;

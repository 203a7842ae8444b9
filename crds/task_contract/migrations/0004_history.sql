-- The history of tasks: every attempt that counted, and every transition, numbered. Primary data, as the rows of tasks that are
-- deleted: unlike those of live tasks they cannot be made again from the API server. The operator writes both tables in the
-- transaction in which it writes the row of the task.

-- What status.attempts held at any time, beyond its bound of five. An attempt that is given back has no row: it does not count.
CREATE TABLE attempts (
    task_uid    uuid     NOT NULL,
    number      smallint NOT NULL,
    job         text     NOT NULL,
    started_at  timestamptz,
    finished_at timestamptz, -- null while it runs, and of one that ran when its task was deleted
    reason      text,        -- Succeeded, or why it failed
    error       jsonb,       -- status.error as the attempt left it; null of one that was not seen before the next had ended
    PRIMARY KEY (task_uid, number)
);

-- Transitions. Numbers become visible in their order: whoever inserts holds an advisory lock from before the first number is drawn
-- until the commit (0x70746576656e7473, "ptevents"). So a reader that asks for number > the last it has seen misses none.
-- After each commit the highest number is sent on the channel task_events.
CREATE TABLE task_events (
    number    bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    task_uid  uuid        NOT NULL,
    namespace text        NOT NULL,
    name      text        NOT NULL,
    kb_id     text,
    type      text        NOT NULL,
    phase     text        NOT NULL, -- that the task has come into; Deleted: it was deleted before it had ended
    attempt   smallint    NOT NULL, -- that runs or has ended; of Queued the one that is waited for
    reason    text        NOT NULL,
    message   text,
    queued_at timestamptz NOT NULL, -- beginning of the stay in the queue that this belongs to
    at        timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX task_events_by_task ON task_events (task_uid, number);
CREATE INDEX task_events_by_namespace ON task_events (namespace, number);

-- Of the condition Ready: why a task is in its phase. And up to which version task_events tells of it: null, or another one than
-- resource_version, when a release has written the row that tells nothing.
ALTER TABLE tasks
    ADD COLUMN reason       text,
    ADD COLUMN message      text,
    ADD COLUMN duplicate_of text,
    ADD COLUMN told_version bigint;

-- Every full list reads the rows of tasks that exist: ten thousand beside a million that are archived.
CREATE INDEX tasks_present ON tasks (namespace) WHERE deleted_at IS NULL;

-- Archived rows in the order in which they expire.
CREATE INDEX tasks_archived ON tasks (deleted_at) WHERE deleted_at IS NOT NULL;

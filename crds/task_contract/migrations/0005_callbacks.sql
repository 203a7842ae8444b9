-- The outbox of callbacks, and how far each broker has been told of the events. Primary data: neither can be made again.

-- One row a task, written in the transaction that writes the end of the task to task_events. A task that ends a second time (its
-- cluster was restored from a backup) has its row already. Senders take rows that are due (pending, next_at is past) with FOR
-- UPDATE SKIP LOCKED and move next_at to the end of their lease: who dies over one leaves it to others after that.
-- To send callbacks again, whatever has become of them:
--   UPDATE callbacks SET state = 'pending', next_at = now(), attempts = 0, first_attempt_at = NULL, finished_at = NULL, lease = NULL
--   WHERE namespace = $1 AND name = $2; NOTIFY task_callbacks;
-- The id stays: a receiver that has had it knows it.
CREATE TABLE callbacks (
    id               text        PRIMARY KEY, -- webhook-id
    task_uid         uuid        NOT NULL UNIQUE,
    namespace        text        NOT NULL,
    name             text        NOT NULL,
    kb_id            text,
    url              text        NOT NULL,    -- with its fields filled in
    host             text        NOT NULL,    -- host:port of it; so many at once of one host
    secret_name      text,                    -- Secret in the namespace whose key signs; null: unsigned
    secret_key       text,
    body             text        NOT NULL,    -- as it is sent and signed, byte for byte in UTF-8
    state            text        NOT NULL DEFAULT 'pending' CHECK (state IN ('pending', 'delivered', 'dead')),
    attempts         integer     NOT NULL DEFAULT 0,
    next_at          timestamptz NOT NULL DEFAULT now(), -- of a pending one: when it is due, or the lease of its sender ends
    lease            uuid,                    -- of the sender that has it
    created_at       timestamptz NOT NULL DEFAULT now(),
    first_attempt_at timestamptz,             -- a day after it the callback is given up
    last_attempt_at  timestamptz,
    finished_at      timestamptz,             -- when it was delivered or given up
    status_code      smallint,                -- of the last answer; null: there was none
    error            text,                    -- why the last attempt did not deliver it
    told_state       text                     -- what status.callback of the task says
);
CREATE INDEX callbacks_due ON callbacks (host, next_at) WHERE state = 'pending';
CREATE INDEX callbacks_by_state ON callbacks (state, namespace, created_at DESC);
CREATE INDEX callbacks_untold ON callbacks (last_attempt_at) WHERE told_state IS DISTINCT FROM state;

-- Up to which number of task_events each sink has taken them: redis, rabbitmq. Who publishes to one holds an advisory lock.
CREATE TABLE event_cursors (
    sink       text        PRIMARY KEY,
    number     bigint      NOT NULL,
    updated_at timestamptz NOT NULL DEFAULT now()
);

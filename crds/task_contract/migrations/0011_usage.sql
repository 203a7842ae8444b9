-- What attempts cost: a row for each process that worked on one, written by the runner when the attempt ends in it. An attempt of a
-- batch has one for each of its pods, one that was given back and begun anew has several. A process that is killed leaves none.
CREATE TABLE task_usage (
    number              bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    task_uid            uuid             NOT NULL,
    attempt             smallint         NOT NULL,
    holder              text             NOT NULL,
    namespace           text             NOT NULL,
    kb_id               text,
    type                text             NOT NULL,
    outcome             text             NOT NULL, -- Succeeded, Failed, GivenBack, Fenced
    seconds             double precision NOT NULL, -- from the beginning of the process, or of the attempt in a warm worker
    cpu_seconds         double precision NOT NULL, -- with child processes
    memory_byte_seconds double precision NOT NULL,
    memory_peak_bytes   bigint           NOT NULL,
    tokens              bigint           NOT NULL, -- that were embedded, padding left out
    texts               bigint           NOT NULL,
    stages              jsonb            NOT NULL, -- {"embed": seconds}
    stores              jsonb            NOT NULL, -- {"milvus": [requests, seconds]}
    ended_at            timestamptz      NOT NULL DEFAULT now(),
    counted             boolean          NOT NULL DEFAULT false -- in the metrics of an operator
);
CREATE INDEX task_usage_by_task ON task_usage (task_uid);
CREATE INDEX task_usage_by_knowledge_base ON task_usage (namespace, kb_id, ended_at);
CREATE INDEX task_usage_to_count ON task_usage (number) WHERE NOT counted;

CREATE VIEW task_costs AS
    SELECT task_uid, min(namespace) AS namespace, min(kb_id) AS kb_id, min(type) AS type, count(DISTINCT attempt) AS attempts,
           count(*) AS processes, sum(seconds) AS seconds, sum(cpu_seconds) AS cpu_seconds,
           sum(memory_byte_seconds) AS memory_byte_seconds, max(memory_peak_bytes) AS memory_peak_bytes,
           sum(tokens)::bigint AS tokens, sum(texts)::bigint AS texts, max(ended_at) AS ended_at
    FROM task_usage GROUP BY task_uid;

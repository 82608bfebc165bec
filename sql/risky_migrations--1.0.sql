/* risky_migrations 1.0 */

-- complain if script is sourced in psql, rather than via CREATE EXTENSION
\echo Use "CREATE EXTENSION risky_migrations" to load this file. \quit

-- Sections: state, do, steer, know, watch, probes, lab; as in doc/architecture.md.
-- What people call lives in the extension's schema and starts with rm_; what
-- the extension keeps lives in the schema risky_migrations.

-----------------------------------------------------------------------
-- State
-----------------------------------------------------------------------

CREATE SCHEMA risky_migrations;
GRANT USAGE ON SCHEMA risky_migrations TO PUBLIC;
COMMENT ON SCHEMA risky_migrations IS
	'state and step log of the extension risky_migrations; written by it alone';

CREATE TABLE risky_migrations.migration (
	id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
	method text NOT NULL CHECK (method IN ('direct', 'three_step')),
	state text NOT NULL DEFAULT 'open' CHECK (state IN ('open', 'done', 'rolled back')),
	steps_done integer NOT NULL DEFAULT 0,
	phase integer NOT NULL DEFAULT 0,
	owner oid NOT NULL,
	relid oid NOT NULL,
	relation text NOT NULL,
	attnum smallint NOT NULL,
	column_name text NOT NULL,
	old_type text NOT NULL,
	old_type_id oid NOT NULL,
	old_collation text,
	old_storage text,
	old_compression text,
	new_type text NOT NULL,
	new_type_id oid NOT NULL,
	new_typmod integer NOT NULL,
	new_attnum smallint NOT NULL DEFAULT 0,
	new_column text,
	using_expr text NOT NULL,
	reverse_expr text,
	exact_check text,
	reverse_check text,
	settings text[] NOT NULL,
	conversion_tree text NOT NULL,
	server_version integer NOT NULL,
	enforced boolean NOT NULL DEFAULT false,
	trigger_xmin bigint NOT NULL DEFAULT 0,
	relfilenode oid NOT NULL DEFAULT 0,
	next_block bigint NOT NULL DEFAULT 0,
	end_block bigint NOT NULL DEFAULT 0,
	rows_done bigint NOT NULL DEFAULT 0,
	rows_estimated bigint NOT NULL DEFAULT 0,
	inexact_rows bigint NOT NULL DEFAULT 0,
	null_on_error boolean NOT NULL DEFAULT false,
	created_at timestamptz NOT NULL DEFAULT clock_timestamp()
) WITH (fillfactor = 10);
COMMENT ON TABLE risky_migrations.migration IS 'one requested change of one column''s type; one row of state';

-- not part of the migration's row, which its runner keeps locked: whoever wants
-- something of the runner must not wait for it
CREATE TABLE risky_migrations.steering (
	migration_id bigint PRIMARY KEY REFERENCES risky_migrations.migration ON DELETE CASCADE,
	wanted text NOT NULL DEFAULT 'run' CHECK (wanted IN ('run', 'paused', 'cancelled')),
	wanted_by oid,
	wanted_at timestamptz,
	all_steps boolean NOT NULL DEFAULT false,
	cut_over text NOT NULL DEFAULT 'auto' CHECK (cut_over IN ('auto', 'manual')),
	batch integer NOT NULL DEFAULT 100000,
	background boolean NOT NULL DEFAULT false,
	session_role oid,
	role oid,
	settings text[],
	launches integer NOT NULL DEFAULT 0,
	launch_mark text
);
COMMENT ON TABLE risky_migrations.steering IS 'how a migration is to be run, and what is wanted of its runner; no row for one that is run step by step and left alone';

CREATE TABLE risky_migrations.skipped_row (
	migration_id bigint NOT NULL,
	relfilenode oid NOT NULL,
	row_tid tid NOT NULL
);
CREATE INDEX ON risky_migrations.skipped_row (migration_id);
COMMENT ON TABLE risky_migrations.skipped_row IS 'rows that were locked when the backfill came by, to be visited one by one';

-- no foreign key: it would make a writer wait for whoever runs the migration,
-- or fail when its snapshot is older than the migration's row
CREATE TABLE risky_migrations.conversion_error (
	migration_id bigint NOT NULL,
	at timestamptz NOT NULL DEFAULT clock_timestamp(),
	row_key text,
	row_tid tid,
	value text,
	sqlstate text NOT NULL,
	message text NOT NULL
);
CREATE INDEX ON risky_migrations.conversion_error (migration_id);
COMMENT ON TABLE risky_migrations.conversion_error IS 'values that did not convert; hints, the rows themselves are looked at again';

CREATE TABLE risky_migrations.step_log (
	id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
	migration_id bigint REFERENCES risky_migrations.migration ON DELETE CASCADE,
	approach text NOT NULL,
	step text NOT NULL,
	direction text NOT NULL CHECK (direction IN ('apply', 'rollback')),
	state text NOT NULL CHECK (state IN ('running', 'done', 'failed', 'interrupted')),
	owner oid NOT NULL,
	relid oid NOT NULL,
	relation text NOT NULL,
	pid integer NOT NULL DEFAULT pg_backend_pid(),
	started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
	finished_at timestamptz,
	duration_ms double precision,
	transactions bigint NOT NULL DEFAULT 0,
	batches bigint NOT NULL DEFAULT 0,
	rows_changed bigint NOT NULL DEFAULT 0,
	rows_hot bigint NOT NULL DEFAULT 0,
	lock_retries bigint NOT NULL DEFAULT 0,
	wal_bytes bigint NOT NULL DEFAULT 0,
	sqlstate text,
	message text,
	detail text,
	hint text
) WITH (fillfactor = 50);
CREATE INDEX ON risky_migrations.step_log (relid);
COMMENT ON TABLE risky_migrations.step_log IS 'every step that was begun: what all reports read';

CREATE TABLE risky_migrations.step_lock (
	step_id bigint NOT NULL REFERENCES risky_migrations.step_log ON DELETE CASCADE,
	relid oid NOT NULL,
	relation text NOT NULL,
	role text NOT NULL,
	lock_mode text NOT NULL,
	blocks_reads boolean NOT NULL,
	blocks_writes boolean NOT NULL,
	wait_ms double precision,
	hold_ms double precision,
	hold_is_exact boolean NOT NULL,
	times bigint NOT NULL,
	rewritten boolean NOT NULL,
	PRIMARY KEY (step_id, relid, lock_mode)
);
COMMENT ON TABLE risky_migrations.step_lock IS 'the locks of each step on user relations, read from the lock table before each commit';

CREATE TABLE risky_migrations.lab (
	nspid oid PRIMARY KEY,
	small_relid oid NOT NULL,
	large_relid oid NOT NULL,
	owner oid NOT NULL,
	created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
COMMENT ON TABLE risky_migrations.lab IS 'the tables that migration 0001 of the lab made, by schema';

CREATE TABLE risky_migrations.probe (
	id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
	owner oid NOT NULL,
	session_role oid NOT NULL,
	query text NOT NULL,
	every interval NOT NULL,
	timeout interval NOT NULL,
	time_limit interval NOT NULL,
	settings text[] NOT NULL DEFAULT '{}',
	started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
	ended_at timestamptz,
	end_reason text
);
COMMENT ON TABLE risky_migrations.probe IS 'background workers that run one query again and again and record each latency';

CREATE TABLE risky_migrations.probe_sample (
	probe_id bigint NOT NULL REFERENCES risky_migrations.probe ON DELETE CASCADE,
	at timestamptz NOT NULL,
	latency_ms double precision NOT NULL,
	outcome text NOT NULL CHECK (outcome IN ('ok', 'timeout', 'error')),
	sqlstate text,
	message text
);
CREATE INDEX ON risky_migrations.probe_sample (probe_id, at);
COMMENT ON TABLE risky_migrations.probe_sample IS 'what the probes measured';

CREATE TABLE risky_migrations.comparison (
	id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
	run_id bigint NOT NULL,
	approach text NOT NULL,
	owner oid NOT NULL,
	rows bigint NOT NULL,
	started_at timestamptz NOT NULL,
	finished_at timestamptz NOT NULL,
	first_step bigint NOT NULL,
	last_step bigint NOT NULL,
	read_probe bigint NOT NULL,
	write_probe bigint NOT NULL,
	heap_bytes_before bigint NOT NULL,
	heap_bytes_after bigint NOT NULL,
	index_bytes_before bigint NOT NULL,
	index_bytes_after bigint NOT NULL,
	rows_checked bigint NOT NULL,
	rows_wrong bigint NOT NULL
);
COMMENT ON TABLE risky_migrations.comparison IS 'the runs of rm_compare, one row for each approach';

-- who may see what belongs to a table: who may act as its owner, or, when the
-- table is gone, as the role that did it
CREATE FUNCTION risky_migrations.may_see(relid oid, owner oid) RETURNS boolean
LANGUAGE sql STABLE PARALLEL SAFE
BEGIN ATOMIC
	SELECT coalesce(
		(SELECT pg_has_role(c.relowner, 'USAGE') FROM pg_catalog.pg_class c WHERE c.oid = relid),
		-- a role that was dropped has no members: only superusers see its rows
		(SELECT pg_has_role(r.oid, 'USAGE') FROM pg_catalog.pg_roles r WHERE r.oid = owner),
		(SELECT r.rolsuper FROM pg_catalog.pg_roles r WHERE r.rolname = current_user));
END;
COMMENT ON FUNCTION risky_migrations.may_see(oid, oid) IS
	'may the current role see the state that belongs to this table?';

-----------------------------------------------------------------------
-- Do
-----------------------------------------------------------------------

CREATE FUNCTION risky_migrations.sync() RETURNS trigger
AS 'MODULE_PATHNAME', 'rm_sync' LANGUAGE C;
COMMENT ON FUNCTION risky_migrations.sync() IS
	'the sync trigger; made by rm_add_column() with the migration''s id as its argument';

CREATE FUNCTION risky_migrations.steady_text(value text) RETURNS text
AS 'MODULE_PATHNAME', 'rm_steady_text' LANGUAGE C IMMUTABLE STRICT PARALLEL SAFE;
COMMENT ON FUNCTION risky_migrations.steady_text(text) IS
	'the value itself; an error (22007) if it names a moment by the clock, such as today';

CREATE FUNCTION risky_migrations.step_name(method text, steps_done integer) RETURNS text
AS 'MODULE_PATHNAME', 'rm_step_name' LANGUAGE C IMMUTABLE STRICT PARALLEL SAFE;
COMMENT ON FUNCTION risky_migrations.step_name(text, integer) IS
	'the method''s next step when so many are done; NULL if there is none';

CREATE PROCEDURE rm_alter_type(relation text, column_name text, new_type text,
	using_expr text DEFAULT NULL, method text DEFAULT 'three_step',
	reverse_expr text DEFAULT NULL, cut_over text DEFAULT 'auto',
	on_error text DEFAULT 'stop', batch bigint DEFAULT 100000)
AS 'MODULE_PATHNAME', 'rm_alter_type' LANGUAGE C;
COMMENT ON PROCEDURE rm_alter_type(text, text, text, text, text, text, text, text, bigint) IS
	'changes a column''s type: all steps of the method (three_step or direct), in this session; cut_over manual stops before the swap, on_error null makes NULL what does not convert';

CREATE FUNCTION rm_start(relation text, column_name text, new_type text,
	using_expr text DEFAULT NULL, method text DEFAULT 'three_step',
	reverse_expr text DEFAULT NULL, cut_over text DEFAULT 'auto',
	on_error text DEFAULT 'stop', batch bigint DEFAULT 100000) RETURNS bigint
AS 'MODULE_PATHNAME', 'rm_start' LANGUAGE C VOLATILE;
COMMENT ON FUNCTION rm_start(text, text, text, text, text, text, text, text, bigint) IS
	'the same in a background worker, which begins when the transaction commits and needs no client; returns the migration''s id';

CREATE PROCEDURE risky_migrations.run(migration bigint)
AS 'MODULE_PATHNAME', 'rm_run' LANGUAGE C;
COMMENT ON PROCEDURE risky_migrations.run(bigint) IS
	'goes on with all steps of a migration, in this session; what a background worker calls';

CREATE PROCEDURE rm_cut_over(migration bigint DEFAULT NULL)
AS 'MODULE_PATHNAME', 'rm_cut_over' LANGUAGE C;
COMMENT ON PROCEDURE rm_cut_over(bigint) IS
	'goes on with a migration that was started with cut_over manual and stands before its swap';

CREATE PROCEDURE rm_add_column(relation text, column_name text, new_type text,
	using_expr text DEFAULT NULL)
AS 'MODULE_PATHNAME', 'rm_add_column' LANGUAGE C;
COMMENT ON PROCEDURE rm_add_column(text, text, text, text) IS
	'step 1 of three_step: adds the shadow column <column>_new and the trigger that keeps it in step; ACCESS EXCLUSIVE for milliseconds';

CREATE PROCEDURE rm_backfill_batched(batch bigint DEFAULT 100000, migration bigint DEFAULT NULL)
AS 'MODULE_PATHNAME', 'rm_backfill_batched' LANGUAGE C;
COMMENT ON PROCEDURE rm_backfill_batched(bigint, bigint) IS
	'step 2 of three_step: fills the shadow column, at most batch rows to a transaction; resumable; without a migration''s id the only open one is meant';

CREATE PROCEDURE rm_enforce_not_null(migration bigint DEFAULT NULL)
AS 'MODULE_PATHNAME', 'rm_enforce_not_null' LANGUAGE C;
COMMENT ON PROCEDURE rm_enforce_not_null(bigint) IS
	'step 3 of three_step: verifies every row and makes the shadow column NOT NULL without a scan under the lock';

CREATE PROCEDURE rm_rollback(migration bigint DEFAULT NULL)
AS 'MODULE_PATHNAME', 'rm_rollback' LANGUAGE C;
COMMENT ON PROCEDURE rm_rollback(bigint) IS
	'takes a migration back from wherever it stands, with nothing left lying about';

-----------------------------------------------------------------------
-- Steer
-----------------------------------------------------------------------

CREATE FUNCTION rm_pause(migration bigint DEFAULT NULL) RETURNS bigint
AS 'MODULE_PATHNAME', 'rm_pause' LANGUAGE C VOLATILE;
COMMENT ON FUNCTION rm_pause(bigint) IS
	'has a migration hold nothing and wait, from its next batch on and at once where it waits already; returns its id';

CREATE FUNCTION rm_resume(migration bigint DEFAULT NULL) RETURNS bigint
AS 'MODULE_PATHNAME', 'rm_resume' LANGUAGE C VOLATILE;
COMMENT ON FUNCTION rm_resume(bigint) IS
	'ends a pause; a migration that nobody runs goes on in a background worker, as the caller, from its last committed batch; returns its id';

CREATE FUNCTION rm_cancel(migration bigint DEFAULT NULL) RETURNS bigint
AS 'MODULE_PATHNAME', 'rm_cancel' LANGUAGE C VOLATILE;
COMMENT ON FUNCTION rm_cancel(bigint) IS
	'stops whoever runs a migration, with an error, at once; what is done stays (rm_rollback takes it back); returns its id';

-----------------------------------------------------------------------
-- Know
-----------------------------------------------------------------------

CREATE FUNCTION rm_check_conversion(relation text, column_name text, new_type text,
	using_expr text DEFAULT NULL, max_rows bigint DEFAULT 100,
	OUT row_key text, OUT value text, OUT sqlstate text, OUT message text,
	OUT rows_like_it bigint)
RETURNS SETOF record AS 'MODULE_PATHNAME', 'rm_check_conversion' LANGUAGE C VOLATILE;
COMMENT ON FUNCTION rm_check_conversion(text, text, text, text, bigint) IS
	'the rows whose value would not convert, at most max_rows of them, and how many fail for the same reason; reads the table with ACCESS SHARE only';

-----------------------------------------------------------------------
-- Watch
-----------------------------------------------------------------------

CREATE VIEW rm_migrations WITH (security_barrier) AS
SELECT m.id, m.relation, m.column_name, m.old_type, m.new_type, m.using_expr,
	m.method, m.state, m.steps_done,
	r.pid AS running_pid,
	CASE WHEN m.state <> 'open' THEN NULL
		WHEN s.wanted <> 'run' THEN s.wanted
		WHEN r.pid IS NULL THEN 'not running'
		WHEN s.background THEN 'running in background'
		ELSE 'running in foreground' END AS run_state,
	l.step AS last_step, l.direction AS last_direction,
	CASE WHEN l.state = 'running' AND r.pid IS NULL THEN 'interrupted' ELSE l.state END AS last_step_state,
	l.sqlstate, l.message, l.detail, l.hint,
	CASE WHEN m.state <> 'open' THEN NULL
		WHEN r.pid IS NOT NULL THEN CASE WHEN s.wanted = 'paused' THEN format('SELECT rm_resume(%s)', m.id) END
		WHEN (s.all_steps OR s.wanted <> 'run') AND NOT coalesce(l.direction = 'rollback' AND l.state <> 'done', false)
			AND EXISTS (SELECT FROM pg_catalog.pg_class c WHERE c.oid = m.relid)
			THEN CASE WHEN risky_migrations.step_name(m.method, m.steps_done) = 'swap' AND s.cut_over = 'manual'
					THEN format('CALL rm_cut_over(%s)', m.id)
				WHEN risky_migrations.step_name(m.method, m.steps_done) IS NOT NULL
					THEN format('SELECT rm_resume(%s)', m.id) END
		WHEN m.method = 'direct' OR m.steps_done = 0
			OR l.direction = 'rollback' AND l.state <> 'done'
			OR NOT EXISTS (SELECT FROM pg_catalog.pg_class c WHERE c.oid = m.relid)
			THEN format('CALL rm_rollback(%s)', m.id)
		WHEN m.steps_done = 1 THEN format('CALL rm_backfill_batched(100000, %s)', m.id)
		WHEN m.steps_done = 2 THEN format('CALL rm_enforce_not_null(%s)', m.id)
	END AS next_call,
	m.created_at
FROM risky_migrations.migration m
LEFT JOIN risky_migrations.steering s ON s.migration_id = m.id
LEFT JOIN LATERAL (
	SELECT k.pid FROM pg_catalog.pg_locks k
	WHERE k.locktype = 'advisory' AND k.objsubid = 3 AND k.granted
	AND k.database = (SELECT d.oid FROM pg_catalog.pg_database d WHERE d.datname = current_database())
	AND (k.classid::bigint << 32) | k.objid::bigint = m.id) r ON true
LEFT JOIN LATERAL (
	SELECT s.* FROM risky_migrations.step_log s
	WHERE s.migration_id = m.id ORDER BY s.id DESC LIMIT 1) l ON true
WHERE risky_migrations.may_see(m.relid, m.owner);
COMMENT ON VIEW rm_migrations IS
	'every migration of tables one may act as the owner of: state, last step, its error, and what to call next';

CREATE VIEW rm_progress WITH (security_barrier) AS
SELECT m.id AS migration, m.relation, l.step, l.direction, l.pid, l.started_at,
	m.next_block AS blocks_done, m.end_block AS blocks_total,
	round(100.0 * m.next_block / nullif(m.end_block, 0), 1) AS percent,
	m.rows_done,
	round((1000 * l.rows_changed / nullif(l.duration_ms, 0))::numeric) AS rows_per_second,
	l.lock_retries,
	a.wait_event_type, a.wait_event,
	coalesce(s.wanted = 'paused', false) AS paused
FROM risky_migrations.migration m
JOIN risky_migrations.step_log l ON l.migration_id = m.id AND l.state = 'running'
LEFT JOIN risky_migrations.steering s ON s.migration_id = m.id
LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid
WHERE risky_migrations.may_see(m.relid, m.owner);
COMMENT ON VIEW rm_progress IS
	'the steps that are running: pages done and total, rows, rows per second, what it waits for';

CREATE VIEW rm_conversion_errors WITH (security_barrier) AS
SELECT DISTINCT ON (e.migration_id, e.row_key)
	e.migration_id AS migration, m.relation, m.column_name, e.row_key, e.value,
	e.sqlstate, e.message, e.at
FROM risky_migrations.conversion_error e
JOIN risky_migrations.migration m ON m.id = e.migration_id
WHERE risky_migrations.may_see(m.relid, m.owner)
ORDER BY e.migration_id, e.row_key, e.at DESC;
COMMENT ON VIEW rm_conversion_errors IS
	'values that did not convert, the last one of each row; a hint, since the row may have been mended or deleted';

CREATE VIEW risky_migrations.lock_report WITH (security_barrier) AS
SELECT s.approach, s.step || CASE s.direction WHEN 'rollback' THEN ' (rollback)' ELSE '' END AS step,
	k.relation, k.role, k.lock_mode, k.blocks_reads, k.blocks_writes,
	round(k.wait_ms::numeric, 3) AS wait_ms, round(k.hold_ms::numeric, 3) AS hold_ms,
	k.hold_is_exact, k.rewritten, s.started_at,
	s.id AS step_id, k.times
FROM risky_migrations.step_lock k
JOIN risky_migrations.step_log s ON s.id = k.step_id
WHERE risky_migrations.may_see(s.relid, s.owner);
GRANT SELECT ON risky_migrations.lock_report TO PUBLIC;
COMMENT ON VIEW risky_migrations.lock_report IS 'what rm_lock_report() shows';

CREATE FUNCTION rm_lock_report(OUT approach text, OUT step text, OUT relation text,
	OUT role text, OUT lock_mode text, OUT blocks_reads boolean,
	OUT blocks_writes boolean, OUT wait_ms numeric, OUT hold_ms numeric,
	OUT hold_is_exact boolean, OUT rewritten boolean, OUT started_at timestamptz)
RETURNS SETOF record LANGUAGE sql STABLE
BEGIN ATOMIC
	SELECT r.approach, r.step, r.relation, r.role, r.lock_mode, r.blocks_reads,
		r.blocks_writes, r.wait_ms, r.hold_ms, r.hold_is_exact, r.rewritten, r.started_at
	FROM risky_migrations.lock_report r
	ORDER BY r.step_id, r.relation, r.lock_mode;
END;
COMMENT ON FUNCTION rm_lock_report() IS
	'the locks of every step run so far on user relations; wait and hold in milliseconds, the longest of the step''s transactions, exact or upper bounds';

CREATE FUNCTION rm_blocked_queries(OUT waiting_pid integer, OUT waiting_query text,
	OUT relation text, OUT lock_mode text, OUT waited interval,
	OUT blocking_pid integer, OUT blocking_query text, OUT blocking_state text,
	OUT depth integer)
RETURNS SETOF record LANGUAGE sql VOLATILE
BEGIN ATOMIC
	WITH RECURSIVE waiting AS MATERIALIZED (
		SELECT l.pid, l.mode, l.waitstart, l.relation,
			pg_blocking_pids(l.pid) AS blockers
		FROM pg_catalog.pg_locks l WHERE NOT l.granted
	), edge AS (
		SELECT DISTINCT w.pid, b AS blocker
		FROM waiting w, unnest(w.blockers) b
	), chain (pid, depth) AS (
		SELECT e.pid, 1 FROM edge e
		WHERE NOT EXISTS (SELECT FROM waiting w WHERE w.pid = e.blocker)
		UNION
		SELECT e.pid, c.depth + 1 FROM chain c JOIN edge e ON e.blocker = c.pid
		WHERE c.depth < 100
	)
	SELECT w.pid, a.query,
		coalesce(w.relation, t.relation)::regclass::text, w.mode,
		clock_timestamp() - w.waitstart,
		e.blocker, b.query, coalesce(b.state, 'prepared transaction'),
		(SELECT max(c.depth) FROM chain c WHERE c.pid = w.pid)
	FROM waiting w
	JOIN edge e ON e.pid = w.pid
	LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = w.pid
	LEFT JOIN pg_catalog.pg_stat_activity b ON b.pid = e.blocker
	LEFT JOIN LATERAL (SELECT k.relation FROM pg_catalog.pg_locks k
		WHERE k.pid = w.pid AND k.locktype = 'tuple' LIMIT 1) t ON true
	ORDER BY 9, w.waitstart, w.pid, e.blocker;
END;
COMMENT ON FUNCTION rm_blocked_queries() IS
	'who waits for a lock and for whom, one row for each blocker; depth 1 is blocked by one that does not wait itself';

CREATE FUNCTION rm_active_queries(OUT pid integer, OUT role name, OUT backend_type text,
	OUT state text, OUT running_for interval, OUT transaction_for interval,
	OUT wait_event_type text, OUT wait_event text, OUT blocked_by integer[],
	OUT query text)
RETURNS SETOF record LANGUAGE sql VOLATILE
BEGIN ATOMIC
	SELECT a.pid, a.usename, a.backend_type, a.state,
		clock_timestamp() - a.query_start, clock_timestamp() - a.xact_start,
		a.wait_event_type, a.wait_event,
		CASE WHEN a.wait_event_type = 'Lock' THEN pg_blocking_pids(a.pid) ELSE '{}' END,
		a.query
	FROM pg_catalog.pg_stat_activity a
	WHERE a.datname = current_database() AND a.pid <> pg_backend_pid()
		AND a.state IS DISTINCT FROM 'idle'
	ORDER BY a.xact_start NULLS LAST, a.pid;
END;
COMMENT ON FUNCTION rm_active_queries() IS
	'what the other sessions of this database are doing, the oldest transaction first';

CREATE FUNCTION rm_table_sizes(OUT relation text, OUT rows_estimated bigint,
	OUT heap_bytes bigint, OUT toast_bytes bigint, OUT index_bytes bigint,
	OUT total_bytes bigint, OUT total text)
RETURNS SETOF record LANGUAGE sql STABLE
BEGIN ATOMIC
	SELECT c.oid::regclass::text, nullif(c.reltuples, -1)::bigint,
		pg_relation_size(c.oid),
		coalesce(pg_total_relation_size(nullif(c.reltoastrelid, 0)), 0),
		pg_indexes_size(c.oid), pg_total_relation_size(c.oid),
		pg_size_pretty(pg_total_relation_size(c.oid))
	FROM pg_catalog.pg_class c
	JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
	WHERE c.relkind IN ('r', 'm') AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'risky_migrations')
		AND n.nspname !~ '^pg_(toast|temp)'
	ORDER BY pg_total_relation_size(c.oid) DESC, 1;
END;
COMMENT ON FUNCTION rm_table_sizes() IS
	'size of every table in bytes: heap, TOAST, indexes, total; rows as last estimated';

-----------------------------------------------------------------------
-- Probes
-----------------------------------------------------------------------

CREATE FUNCTION rm_probe_start(query text, every interval DEFAULT '10 ms',
	timeout interval DEFAULT '5 s', time_limit interval DEFAULT '1 hour')
RETURNS bigint AS 'MODULE_PATHNAME', 'rm_probe_start' LANGUAGE C VOLATILE;
COMMENT ON FUNCTION rm_probe_start(text, interval, interval, interval) IS
	'starts a background worker that runs the query every so often as the caller and records each latency; returns its id; it begins when the transaction commits';

CREATE FUNCTION rm_probe_stop(id bigint) RETURNS bigint
AS 'MODULE_PATHNAME', 'rm_probe_stop' LANGUAGE C VOLATILE;
COMMENT ON FUNCTION rm_probe_stop(bigint) IS
	'ends a probe of one''s own; returns the number of samples it has recorded';

CREATE VIEW rm_probes WITH (security_barrier) AS
SELECT p.id, p.query, p.every, p.timeout, p.time_limit, p.started_at, p.ended_at,
	p.end_reason, k.pid IS NOT NULL AS running, k.pid
FROM risky_migrations.probe p
LEFT JOIN LATERAL (
	SELECT k.pid FROM pg_catalog.pg_locks k
	WHERE k.locktype = 'advisory' AND k.objsubid = 4 AND k.granted
	AND k.database = (SELECT d.oid FROM pg_catalog.pg_database d WHERE d.datname = current_database())
	AND (k.classid::bigint << 32) | k.objid::bigint = p.id) k ON true
WHERE pg_has_role(p.owner, 'USAGE');
COMMENT ON VIEW rm_probes IS 'one''s own probes, running and ended';

CREATE VIEW rm_probe_results WITH (security_barrier) AS
SELECT s.probe_id, s.at, s.latency_ms, s.outcome, s.sqlstate, s.message
FROM risky_migrations.probe_sample s
JOIN risky_migrations.probe p ON p.id = s.probe_id
WHERE pg_has_role(p.owner, 'USAGE');
COMMENT ON VIEW rm_probe_results IS
	'what one''s own probes have measured: at is when a run was due, latency_ms from then to its end, outcome ok, timeout or error';

GRANT SELECT ON rm_migrations, rm_progress, rm_conversion_errors, rm_probes, rm_probe_results TO PUBLIC;

-----------------------------------------------------------------------
-- The lab
-----------------------------------------------------------------------

CREATE FUNCTION risky_migrations.is_lab_form(value text) RETURNS boolean
AS 'MODULE_PATHNAME', 'rm_is_lab_form' LANGUAGE C IMMUTABLE STRICT PARALLEL SAFE;
COMMENT ON FUNCTION risky_migrations.is_lab_form(text) IS
	'is it written YYYY-MM-DD HH:MM:SS, so that the way back from a timestamp is exact?';

CREATE FUNCTION risky_migrations.lab_moment(n bigint) RETURNS text
AS 'MODULE_PATHNAME', 'rm_lab_moment' LANGUAGE C IMMUTABLE STRICT PARALLEL SAFE;
COMMENT ON FUNCTION risky_migrations.lab_moment(bigint) IS
	'the n-th of the seeded moments: 2024-01-01 10:00:00 and n - 1 seconds';

CREATE FUNCTION risky_migrations.lab_write(rows bigint) RETURNS text
AS 'MODULE_PATHNAME', 'rm_lab_write' LANGUAGE C VOLATILE;
COMMENT ON FUNCTION risky_migrations.lab_write(bigint) IS
	'inserts a row into large_record and updates one of the first rows, both with the truth in their names; returns what was written';

CREATE PROCEDURE rm_migrate(target text)
AS 'MODULE_PATHNAME', 'rm_migrate' LANGUAGE C;
COMMENT ON PROCEDURE rm_migrate(text) IS
	'takes the lab in the current schema to a migration, 0001 to 0005, forth or back; zero drops its tables';

CREATE FUNCTION rm_seed(n bigint, batch bigint DEFAULT 10000) RETURNS bigint
AS 'MODULE_PATHNAME', 'rm_seed' LANGUAGE C VOLATILE;
COMMENT ON FUNCTION rm_seed(bigint, bigint) IS
	'fills the lab''s large_record with n rows (and small_record with 100), replacing what they held; returns n';

CREATE FUNCTION rm_list_large() RETURNS json
AS 'MODULE_PATHNAME', 'rm_list_large' LANGUAGE C VOLATILE;
COMMENT ON FUNCTION rm_list_large() IS
	'the lab''s endpoint: the first ten rows of large_record as {"records": [{"id", "name", "created_at"}, ...], "count": 10}';

CREATE FUNCTION rm_lab_check(OUT rows_checked bigint, OUT rows_wrong bigint)
AS 'MODULE_PATHNAME', 'rm_lab_check' LANGUAGE C VOLATILE;
COMMENT ON FUNCTION rm_lab_check() IS
	'compares every row of large_record with the truth that its name tells';

CREATE PROCEDURE rm_compare(rows bigint DEFAULT 1000000, every interval DEFAULT '10 ms',
	timeout interval DEFAULT '5 s')
AS 'MODULE_PATHNAME', 'rm_compare' LANGUAGE C;
COMMENT ON PROCEDURE rm_compare(bigint, interval, interval) IS
	'runs the direct change and the three steps one after the other on fresh tables of so many rows, under a read and a write probe; see rm_comparison() and rm_timeline()';

-- the filter stands outside of the UNION: inside it would not be a barrier
CREATE VIEW risky_migrations.lab_step WITH (security_barrier) AS
SELECT u.nspid, u.relid, u.method, u.steps_done, u.step, u.started_at, u.duration_ms
FROM (
	SELECT l.nspid, m.relid, m.owner, m.method, m.steps_done, s.step, s.started_at,
		s.duration_ms
	FROM risky_migrations.lab l
	JOIN risky_migrations.migration m ON m.relid IN (l.small_relid, l.large_relid)
		AND m.state IN ('open', 'done')
	JOIN risky_migrations.step_log s ON s.migration_id = m.id
		AND s.direction = 'apply' AND s.state = 'done'
	UNION ALL
	SELECT l.nspid, s.relid, s.owner, s.approach, 1, s.step, s.started_at, s.duration_ms
	FROM risky_migrations.lab l
	JOIN risky_migrations.step_log s ON s.relid = l.large_relid AND s.approach = 'lab'
		AND s.direction = 'apply' AND s.state = 'done'
	OFFSET 0) u
WHERE risky_migrations.may_see(u.relid, u.owner)
	-- a lab that has lost a table is none
	AND (SELECT count(*) FROM pg_catalog.pg_class c
		JOIN risky_migrations.lab l ON c.oid IN (l.small_relid, l.large_relid)
		WHERE l.nspid = u.nspid AND c.relnamespace = l.nspid
			AND c.relname IN ('small_record', 'large_record')) = 2;
GRANT SELECT ON risky_migrations.lab_step TO PUBLIC;
COMMENT ON VIEW risky_migrations.lab_step IS 'the steps of the lab that are in force';

CREATE FUNCTION rm_showmigrations(OUT applied text, OUT number text, OUT name text,
	OUT applied_at timestamptz, OUT duration interval)
RETURNS SETOF record LANGUAGE sql STABLE
BEGIN ATOMIC
	WITH lab AS (
		SELECT s.* FROM risky_migrations.lab_step s
		WHERE s.nspid = (SELECT n.oid FROM pg_catalog.pg_namespace n WHERE n.nspname = current_schema())
	), known (number, name, method, step, nth) AS (
		VALUES ('0001', 'create small_record and large_record', 'lab', 'create_tables', 1),
			('0002', 'direct: ALTER COLUMN created_at TYPE timestamp', 'direct', 'alter_type', 1),
			('0003', 'three_step: add column created_at_new and its trigger', 'three_step', 'add_column', 1),
			('0004', 'three_step: backfill in batches', 'three_step', 'backfill', 2),
			('0005', 'three_step: NOT NULL', 'three_step', 'enforce_not_null', 3)
	)
	SELECT CASE WHEN s.n > 0 THEN '[X]' ELSE '[ ]' END,
		k.number, k.name, s.applied_at, s.duration
	FROM known k
	LEFT JOIN LATERAL (
		SELECT count(*) AS n, max(x.started_at) AS applied_at,
			sum(x.duration_ms) * interval '1 ms' AS duration
		FROM (SELECT DISTINCT ON (l.relid) l.* FROM lab l
			WHERE l.method = k.method AND l.step = k.step AND l.steps_done >= k.nth
			ORDER BY l.relid, l.started_at DESC) x
		-- 0002 is both tables or none
		HAVING count(*) = CASE k.number WHEN '0002' THEN 2 ELSE 1 END) s ON true
	ORDER BY k.number;
END;
COMMENT ON FUNCTION rm_showmigrations() IS
	'the migrations of the lab in the current schema: applied or not, when, and how long it took';

CREATE VIEW risky_migrations.comparison_step WITH (security_barrier) AS
SELECT c.id AS comparison_id, s.id AS step_id, s.step, s.relation, s.started_at,
	s.duration_ms, s.wal_bytes
FROM risky_migrations.comparison c
JOIN risky_migrations.step_log s ON s.id BETWEEN c.first_step AND c.last_step
	AND s.owner = c.owner AND s.approach = c.approach AND s.direction = 'apply'
WHERE pg_has_role(c.owner, 'USAGE');
CREATE VIEW risky_migrations.comparison_latest WITH (security_barrier) AS
SELECT c.* FROM risky_migrations.comparison c
WHERE pg_has_role(c.owner, 'USAGE')
	AND c.run_id = (SELECT max(x.run_id) FROM risky_migrations.comparison x
		WHERE pg_has_role(x.owner, 'USAGE'));
GRANT SELECT ON risky_migrations.comparison_step, risky_migrations.comparison_latest TO PUBLIC;
COMMENT ON VIEW risky_migrations.comparison_step IS 'the steps of each approach that was compared';
COMMENT ON VIEW risky_migrations.comparison_latest IS 'the approaches of the last rm_compare';

CREATE FUNCTION rm_comparison(OUT approach text, OUT rows bigint, OUT total_ms numeric,
	OUT step_ms json, OUT read_longest_ms numeric, OUT read_p99_ms numeric,
	OUT write_longest_ms numeric, OUT write_p99_ms numeric, OUT timeouts bigint,
	OUT errors bigint, OUT probes_made bigint, OUT wal_bytes bigint,
	OUT heap_bytes_before bigint, OUT heap_bytes_after bigint,
	OUT index_bytes_before bigint, OUT index_bytes_after bigint,
	OUT rows_checked bigint, OUT rows_wrong bigint)
RETURNS SETOF record LANGUAGE sql STABLE
BEGIN ATOMIC
	SELECT c.approach, c.rows, s.total_ms, s.step_ms,
		r.longest, r.p99, w.longest, w.p99,
		r.timeouts + w.timeouts, r.errors + w.errors, r.n + w.n, s.wal_bytes,
		c.heap_bytes_before, c.heap_bytes_after, c.index_bytes_before,
		c.index_bytes_after, c.rows_checked, c.rows_wrong
	FROM risky_migrations.comparison_latest c
	CROSS JOIN LATERAL (
		SELECT round(sum(x.duration_ms)::numeric, 1) AS total_ms,
			json_object_agg(x.step || CASE x.step WHEN 'alter_type' THEN ' ' || x.relation ELSE '' END,
				round(x.duration_ms::numeric, 1) ORDER BY x.step_id) AS step_ms,
			sum(x.wal_bytes)::bigint AS wal_bytes
		FROM risky_migrations.comparison_step x WHERE x.comparison_id = c.id) s
	CROSS JOIN LATERAL (
		SELECT round(max(x.latency_ms)::numeric, 1) AS longest,
			round((percentile_disc(0.99) WITHIN GROUP (ORDER BY x.latency_ms))::numeric, 1) AS p99,
			count(*) FILTER (WHERE x.outcome = 'timeout') AS timeouts,
			count(*) FILTER (WHERE x.outcome = 'error') AS errors, count(*) AS n
		FROM rm_probe_results x WHERE x.probe_id = c.read_probe) r
	CROSS JOIN LATERAL (
		SELECT round(max(x.latency_ms)::numeric, 1) AS longest,
			round((percentile_disc(0.99) WITHIN GROUP (ORDER BY x.latency_ms))::numeric, 1) AS p99,
			count(*) FILTER (WHERE x.outcome = 'timeout') AS timeouts,
			count(*) FILTER (WHERE x.outcome = 'error') AS errors, count(*) AS n
		FROM rm_probe_results x WHERE x.probe_id = c.write_probe) w
	ORDER BY c.id;
END;
COMMENT ON FUNCTION rm_comparison() IS
	'the last rm_compare: times in milliseconds, latencies as the probes saw them, WAL written by the migration itself, sizes in bytes, rows checked and wrong';

CREATE FUNCTION rm_timeline() RETURNS SETOF text LANGUAGE sql STABLE
BEGIN ATOMIC
	-- 60 columns stand for the time of the slowest approach, the same for all
	WITH run AS (
		SELECT c.*, extract(epoch FROM c.finished_at - c.started_at) AS seconds,
			max(extract(epoch FROM c.finished_at - c.started_at)) OVER () AS width
		FROM risky_migrations.comparison_latest c
	), lane (comparison_id, ord, sub, label, tail, cells) AS (
		SELECT r.id, 2, s.step_id, s.step || CASE WHEN s.step = 'alter_type' THEN ' ' || regexp_replace(s.relation, '^.*\.', '') ELSE '' END,
			to_char(s.duration_ms, 'FM999,999,990') || ' ms',
			(SELECT string_agg(CASE WHEN x BETWEEN
					floor(60 * extract(epoch FROM s.started_at - r.started_at) / r.width)
					AND floor(60 * (extract(epoch FROM s.started_at - r.started_at) + s.duration_ms / 1000) / r.width)
					THEN '█' ELSE ' ' END, '' ORDER BY x) FROM generate_series(0, 59) x)
		FROM run r JOIN risky_migrations.comparison_step s ON s.comparison_id = r.id
		UNION ALL
		SELECT r.id, 3, p.ord, p.label,
			'max ' || to_char(l.longest, 'FM999,999,990') || ' ms',
			(SELECT string_agg(CASE WHEN x.x > floor(60 * r.seconds / r.width) THEN ' '
					WHEN b.worst >= 1000 THEN '█' WHEN b.worst >= 250 THEN '▓'
					WHEN b.worst >= 50 THEN '▒' WHEN b.worst IS NULL THEN ' ' ELSE '·' END,
					'' ORDER BY x.x)
			FROM generate_series(0, 59) x (x)
			LEFT JOIN (
				SELECT cell, max(v.latency_ms) AS worst
				FROM rm_probe_results v,
					generate_series(
						floor(60 * extract(epoch FROM v.at - r.started_at) / r.width)::int,
						floor(60 * (extract(epoch FROM v.at - r.started_at) + v.latency_ms / 1000) / r.width)::int) cell
				WHERE v.probe_id = p.probe GROUP BY cell) b ON b.cell = x.x)
		FROM run r
		CROSS JOIN LATERAL (VALUES (1, 'reads', r.read_probe), (2, 'writes', r.write_probe)) p (ord, label, probe)
		CROSS JOIN LATERAL (SELECT max(v.latency_ms) AS longest FROM rm_probe_results v WHERE v.probe_id = p.probe) l
		UNION ALL
		SELECT r.id, 1, 0, r.approach, to_char(r.width, 'FM9,990.0') || ' s',
			'0 s' || repeat(' ', 57)
		FROM run r
		UNION ALL
		SELECT r.id, 4, 0, '', '', NULL FROM run r
	)
	SELECT CASE WHEN l.cells IS NULL THEN ''
		ELSE rpad(left(l.label, 24), 24) || ' |' || l.cells || '| ' || left(l.tail, 12) END
	FROM lane l ORDER BY l.comparison_id, l.ord, l.sub;
END;
COMMENT ON FUNCTION rm_timeline() IS
	'the last rm_compare as lines of text: each step, and where reads and writes stood still (▒ from 50 ms, ▓ from 250 ms, █ from 1 s)';

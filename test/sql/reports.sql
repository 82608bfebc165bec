-- The reports: what they show at each point, without times.
\set VERBOSITY default
\set SHOW_CONTEXT never
SET client_min_messages = warning;
DROP EXTENSION IF EXISTS risky_migrations CASCADE;
CREATE EXTENSION risky_migrations;
CREATE SCHEMA reports;
SET search_path = reports, public;

-- 1. Before anything was done, all are empty and none fails
SELECT applied, number, name, applied_at, duration FROM rm_showmigrations();
SELECT count(*) FROM rm_migrations;
SELECT count(*) FROM rm_progress;
SELECT count(*) FROM rm_conversion_errors;
SELECT count(*) FROM rm_lock_report();
SELECT count(*) FROM rm_comparison();
SELECT count(*) FROM rm_timeline();
SELECT count(*) FROM rm_probes;
SELECT count(*) FROM rm_probe_results;
SELECT count(*) FROM rm_blocked_queries();

-- 2. The endpoint: the same at every point but 0002
CALL rm_migrate('0001');
SELECT rm_list_large();
SELECT rm_seed(3);
SELECT rm_list_large();
SELECT rm_seed(12);
SELECT rm_list_large() AS strings;
SELECT rm_list_large()::text AS at_0001 \gset
CALL rm_migrate('0003');
SELECT rm_list_large()::text = :'at_0001' AS same;
CALL rm_migrate('0004');
SELECT rm_list_large()::text = :'at_0001' AS same;
CALL rm_migrate('0005');
SELECT rm_list_large()::text = :'at_0001' AS same;
CALL rm_migrate('0002');
SELECT rm_list_large() AS timestamps;
CALL rm_migrate('0001');
SELECT rm_list_large()::text = :'at_0001' AS same;
-- in the order of the ids, whatever the order of the rows
UPDATE large_record SET name = name WHERE id = 1;
SELECT rm_list_large()::text = :'at_0001' AS same;
-- of the current schema, whatever else is called so
CREATE SCHEMA elsewhere;
SET search_path = elsewhere, reports, public;
\set VERBOSITY sqlstate
SELECT rm_list_large();
\set VERBOSITY default
SET search_path = reports, public;
DROP SCHEMA elsewhere;
-- valid JSON whatever is in the names
UPDATE large_record SET name = E'quote " backslash \\ line\nend \u20ac' WHERE id = 2;
SELECT rm_list_large() -> 'records' -> 1 ->> 'name' = name AS same FROM large_record WHERE id = 2;
SELECT key, json_typeof(value) FROM json_each(rm_list_large()) ORDER BY 1;
SELECT DISTINCT k.key FROM json_array_elements(rm_list_large() -> 'records') r, json_object_keys(r) k (key) ORDER BY 1;
SELECT rm_seed(12);

-- 3. What to call next
CREATE TABLE things (id int PRIMARY KEY, v text NOT NULL);
INSERT INTO things VALUES (1, '1');
CALL rm_add_column('things', 'v', 'int', 'v::int');
SELECT max(id) AS id FROM rm_migrations \gset
SELECT relation, column_name, old_type, new_type, using_expr, method, state, steps_done, running_pid,
	last_step, last_direction, last_step_state, next_call = 'CALL rm_backfill_batched(100000, ' || id || ')' AS next_is_backfill
FROM rm_migrations WHERE id = :id;
SELECT next_call FROM rm_migrations WHERE id = :id \gset
:next_call;
SELECT steps_done, last_step, next_call = 'CALL rm_enforce_not_null(' || id || ')' AS next_is_enforce FROM rm_migrations WHERE id = :id;
SELECT next_call FROM rm_migrations WHERE id = :id \gset
:next_call;
SELECT steps_done, last_step, next_call FROM rm_migrations WHERE id = :id;
CALL rm_rollback();
SELECT state, steps_done, last_step, last_direction, next_call FROM rm_migrations WHERE id = :id;
-- a failure is told in full
UPDATE things SET v = 'bad';
CALL rm_add_column('things', 'v', 'int', 'v::int');
CALL rm_backfill_batched();
\set VERBOSITY sqlstate
CALL rm_enforce_not_null();
\set VERBOSITY default
SELECT last_step, last_step_state, sqlstate, message, detail, hint FROM rm_migrations ORDER BY id DESC LIMIT 1;
SELECT relation, column_name, row_key, value, sqlstate, message FROM rm_conversion_errors;
CALL rm_rollback();
-- nothing is running, so nothing is in progress
SELECT count(*) FROM rm_progress;

-- 4. Sizes
CREATE TABLE big_values (v text);
ALTER TABLE big_values ALTER v SET STORAGE EXTERNAL;
INSERT INTO big_values SELECT repeat('x', 10000) FROM generate_series(1, 20);
ANALYZE big_values;
CREATE TABLE "Empty One" (i int);
CREATE MATERIALIZED VIEW matters AS SELECT 1;
CREATE VIEW no_size AS SELECT 1;
CREATE TEMP TABLE passing (i int);
SELECT s.relation, s.rows_estimated, s.heap_bytes > 0 AS heap, s.toast_bytes > 0 AS toast, s.index_bytes > 0 AS index,
	s.heap_bytes = pg_relation_size(s.relation::regclass) AS heap_right,
	s.index_bytes = pg_indexes_size(s.relation::regclass) AS index_right,
	s.total_bytes = pg_total_relation_size(s.relation::regclass) AS total_right,
	s.heap_bytes + s.toast_bytes + s.index_bytes <= s.total_bytes AS adds_up,
	s.total = pg_size_pretty(s.total_bytes) AS pretty
FROM rm_table_sizes() s WHERE s.relation IN ('big_values', '"Empty One"', 'matters', 'no_size', 'passing', 'things') ORDER BY 1;
-- the largest first, none of the system's and none of the extension's own
SELECT bool_and(total_bytes <= before) AS descending FROM (SELECT total_bytes, lag(total_bytes) OVER () AS before FROM rm_table_sizes()) x;
SELECT count(*) FROM rm_table_sizes() WHERE relation ~ '^(pg_catalog|information_schema|risky_migrations|pg_toast|pg_temp)';

-- 5. Who does what, and who waits for whom
CREATE FUNCTION wait_for(what text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
	found boolean;
BEGIN
	FOR i IN 1..6000 LOOP
		PERFORM pg_stat_clear_snapshot();
		EXECUTE 'SELECT EXISTS (' || what || ')' INTO found;
		IF found THEN RETURN 'seen'; END IF;
		PERFORM pg_sleep(0.01);
	END LOOP;
	RETURN 'not seen in a minute';
END
$$;
SELECT rm_probe_start('UPDATE reports.things SET v = v', '20 ms', '30 s') AS probe \gset
SELECT wait_for('SELECT FROM rm_probe_results WHERE outcome = ''ok''');
-- neither this session nor idle ones are among the active
SELECT count(*) FROM rm_active_queries() WHERE pid = pg_backend_pid() OR state = 'idle';
BEGIN;
LOCK TABLE things IN ACCESS EXCLUSIVE MODE;
SELECT wait_for('SELECT FROM rm_blocked_queries() WHERE relation = ''things'' AND waited > ''20 ms''');
SELECT b.waiting_pid = p.pid AS is_the_probe, b.waiting_query, b.relation, b.lock_mode, b.waited > '0' AS waited,
	b.blocking_pid = pg_backend_pid() AS by_this_session, b.blocking_state, b.depth
FROM rm_blocked_queries() b, rm_probes p WHERE p.id = :probe;
SELECT a.pid = p.pid AS is_the_probe, a.role = current_user AS as_the_caller, a.state, a.wait_event_type, a.wait_event,
	a.blocked_by = ARRAY[pg_backend_pid()] AS by_this_session, a.query, a.running_for > '0' AS running,
	a.transaction_for >= a.running_for AS in_transaction
FROM rm_active_queries() a JOIN rm_probes p ON p.pid = a.pid WHERE p.id = :probe;
COMMIT;
SELECT wait_for('SELECT WHERE NOT EXISTS (SELECT FROM rm_blocked_queries())');
SELECT rm_probe_stop(:probe) > 0 AS samples;
SELECT running, end_reason IS NOT NULL AS has_reason, ended_at >= started_at AS ended FROM rm_probes WHERE id = :probe;
-- the wait was measured
SELECT outcome, max(latency_ms) > 10 AS long_one, bool_and(latency_ms >= 0) AS sane FROM rm_probe_results
WHERE probe_id = :probe GROUP BY 1;
SELECT count(*) FROM rm_active_queries() a WHERE a.query LIKE 'UPDATE reports.things%';

-- 6. The comparison
CALL rm_compare(200, '20 ms', '1 s');
SELECT approach, rows, total_ms > 0 AS took_time, (SELECT array_agg(k) FROM json_object_keys(step_ms) k) AS steps,
	read_longest_ms >= read_p99_ms AND write_longest_ms >= write_p99_ms AND read_p99_ms > 0 AND write_p99_ms > 0 AS latencies,
	timeouts < probes_made AS in_time, errors, probes_made >= 20 AS probed, wal_bytes > 0 AS wal,
	heap_bytes_before > 0 AND heap_bytes_after > 0 AS heap, index_bytes_before > 0 AND index_bytes_after > 0 AS index,
	rows_checked > rows AS with_the_probes_rows, rows_wrong
FROM rm_comparison();
SELECT approach, (SELECT sum(value::text::numeric) FROM json_each(step_ms)) BETWEEN total_ms - 1 AND total_ms + 1 AS steps_add_up FROM rm_comparison();
-- the lab is left at the end of the second approach
SELECT applied, number FROM rm_showmigrations();
SELECT rows_wrong FROM rm_lab_check();
SELECT count(*) FILTER (WHERE running) AS running, count(*) FILTER (WHERE NOT running) AS ended FROM rm_probes;

-- the timeline: one axis for both, a line for each step and each probe
SELECT max(length(t)) <= 100 AS narrow_enough, count(*) FROM rm_timeline() t;
SELECT n, rtrim(left(t, 24)) AS label, substr(t, 25, 2) AS "from", substr(t, 87, 1) AS "to",
	CASE WHEN t = '' THEN 'empty'
		WHEN rtrim(left(t, 24)) IN ('direct', 'online_rewrite', 'three_step') THEN 'scale: ' || regexp_replace(substr(t, 89), '[0-9,.]+', 'N')
		WHEN substr(t, 27, 60) ~ '^ *█+ *$' THEN 'one bar, ' || regexp_replace(substr(t, 89), '[0-9,]+', 'N')
		WHEN substr(t, 27, 60) ~ '^[ ·▒▓█]+$' THEN 'probe, ' || regexp_replace(substr(t, 89), '[0-9,]+', 'N')
		ELSE t END AS what
FROM rm_timeline() WITH ORDINALITY x (t, n) ORDER BY n;
-- steps follow one another
SELECT approach, step, bool_and(started_at >= before) AS in_order FROM (
	SELECT c.approach, s.step, s.started_at, lag(s.started_at) OVER (PARTITION BY c.id ORDER BY s.step_id) AS before
	FROM risky_migrations.comparison_latest c JOIN risky_migrations.comparison_step s ON s.comparison_id = c.id) x
WHERE before IS NOT NULL GROUP BY 1, 2 ORDER BY 1, 2;
-- only the last run is shown
CALL rm_compare(100, '50 ms', '1 s');
SELECT approach, rows, rows_wrong FROM rm_comparison();
SELECT count(*) FROM risky_migrations.comparison;

SET search_path = public;
DROP EXTENSION risky_migrations CASCADE;
DROP SCHEMA reports CASCADE;

-- Whole migrations in one call, and steering them: what is done, what is
-- refused, and what rm_migrations says to call next.  What takes two sessions
-- or a restart is in background.pl.
\set VERBOSITY default
\set SHOW_CONTEXT never
SET client_min_messages = warning;
DROP EXTENSION IF EXISTS risky_migrations CASCADE;
CREATE EXTENSION risky_migrations;
CREATE ROLE regress_rm_steers;
CREATE ROLE regress_rm_cannot;
CREATE SCHEMA steering AUTHORIZATION regress_rm_steers;
GRANT USAGE ON SCHEMA steering TO regress_rm_cannot;
SET search_path = steering, public;

CREATE VIEW public.stands AS
SELECT method, state, steps_done, run_state, last_step, last_step_state, sqlstate,
	replace(next_call, id::text, 'N') AS next_call
FROM rm_migrations ORDER BY id DESC LIMIT 1;
GRANT SELECT ON public.stands TO PUBLIC;
-- until the worker of the last migration has ended, with so many steps done
CREATE PROCEDURE public.wait_for_worker(steps int, failures int DEFAULT 0) LANGUAGE plpgsql AS $$
BEGIN
	FOR i IN 1 .. 6000 LOOP
		COMMIT;
		EXIT WHEN EXISTS (SELECT FROM rm_migrations WHERE id = (SELECT max(id) FROM rm_migrations)
			AND running_pid IS NULL AND steps_done = steps
			AND (failures = 0 OR last_step_state = 'failed'));
		PERFORM pg_sleep(0.01);
	END LOOP;
END $$;
SET ROLE regress_rm_steers;
CREATE TABLE plain (id int PRIMARY KEY, v text NOT NULL);
INSERT INTO plain SELECT g, g::text FROM generate_series(1, 1000) g;
CREATE TABLE nullable (id int PRIMARY KEY, v text);
INSERT INTO nullable VALUES (1, '1'), (2, 'two'), (3, NULL), (4, '4');
RESET ROLE;

-- 1. All steps in one call, here
SET ROLE regress_rm_steers;
CALL rm_alter_type('plain', 'v', 'int', 'v::int', batch => 300);
SELECT count(*) FROM plain WHERE v = v_old::int;
SELECT attnotnull FROM pg_attribute WHERE attrelid = 'plain'::regclass AND attname = 'v';
RESET ROLE;
SELECT step, direction, state, batches FROM risky_migrations.step_log ORDER BY id;
SELECT * FROM stands;
-- there is nothing left that runs by itself
SET client_min_messages = notice;
SELECT rm_resume() = max(id) AS it FROM rm_migrations;
SET client_min_messages = warning;
CALL rm_rollback();

-- directly, and back with the reverse expression
CALL rm_alter_type('plain', 'v', 'int', 'v::int', 'direct', reverse_expr => 'v::text');
SELECT * FROM stands;
SELECT pg_typeof(v), count(*) FROM plain GROUP BY 1;
SELECT max(id) AS id FROM rm_migrations \gset
CALL rm_rollback(:id);
SELECT pg_typeof(v), count(*) FROM plain GROUP BY 1;

-- a first step that fails closes the migration, a later one leaves it open
CALL rm_alter_type('plain', 'v', 'boolean', 'v::boolean', 'direct');
SELECT * FROM stands;
CALL rm_alter_type('nullable', 'v', 'int', 'v::int');
SELECT * FROM stands;
UPDATE nullable SET v = '2' WHERE id = 2;
SELECT rm_resume() = max(id) AS it FROM rm_migrations;
CALL wait_for_worker(5);
SELECT * FROM stands;
SELECT * FROM nullable ORDER BY id;
CALL rm_rollback();

-- 2. on_error => 'null': what does not convert is NULL, and recorded
UPDATE nullable SET v = 'two' WHERE id = 2;
CALL rm_alter_type('nullable', 'v', 'int', 'v::int', on_error => 'null', cut_over => 'manual');
SELECT * FROM stands;
SELECT * FROM nullable ORDER BY id;
SELECT row_key, value, sqlstate FROM rm_conversion_errors;
-- also what is written from now on
INSERT INTO nullable VALUES (5, 'five'), (6, '6');
SELECT id, v, v_new FROM nullable WHERE id > 4 ORDER BY id;
SELECT row_key, value, sqlstate FROM rm_conversion_errors ORDER BY row_key;
CALL rm_cut_over();
SELECT * FROM stands;
SELECT id, v, v_old FROM nullable ORDER BY id;
-- a value that was put there by hand, where there is none: it goes
CALL rm_rollback();
SELECT * FROM nullable ORDER BY id;
CALL rm_add_column('nullable', 'v', 'int', 'v::int');
UPDATE risky_migrations.migration SET null_on_error = true WHERE state = 'open';
CALL rm_backfill_batched();
SET session_replication_role = replica;
SELECT format('ALTER TABLE nullable ENABLE TRIGGER %I', tgname) AS origin,
	format('ALTER TABLE nullable ENABLE ALWAYS TRIGGER %I', tgname) AS always
FROM pg_trigger WHERE tgrelid = 'nullable'::regclass \gset
:origin;
UPDATE nullable SET v_new = 22 WHERE id = 2;
:always;
RESET session_replication_role;
SELECT v_new FROM nullable WHERE id = 2;
CALL rm_enforce_not_null();
SELECT v_new FROM nullable WHERE id = 2;
CALL rm_rollback();
-- not where NULL may not be; nor, found out later, where it may not be any more
CALL rm_alter_type('plain', 'v', 'int', 'v::int', on_error => 'null');
\echo SQLSTATE :SQLSTATE
CALL rm_alter_type('nullable', 'v', 'int', 'v::int', 'direct', on_error => 'null');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('nullable', 'v', 'int', 'v::int');
UPDATE risky_migrations.migration SET null_on_error = true WHERE state = 'open';
CALL rm_backfill_batched();
DELETE FROM nullable WHERE v IS NULL;
ALTER TABLE nullable ALTER v SET NOT NULL;
CALL rm_enforce_not_null();
\echo SQLSTATE :SQLSTATE
CALL rm_rollback();

-- 3. In the background: as the role, and with the settings, of the caller
SET ROLE regress_rm_steers;
SET DateStyle = 'SQL, DMY';
CREATE TABLE days (id int PRIMARY KEY, v text NOT NULL);
INSERT INTO days SELECT g, '02/01/' || 2000 + g FROM generate_series(1, 20) g;
SET risky_migrations.lock_timeout = '111 ms';
SELECT rm_start('days', 'v', 'date', 'v::date', batch => 5) = max(id) + 1 AS it FROM rm_migrations;
CALL wait_for_worker(5);
SELECT * FROM stands;
SELECT v_old, v FROM days WHERE id = 1;
RESET ROLE;
SELECT role::regrole, session_role::regrole = current_user::regrole AS session_user, background, batch,
	'risky_migrations.lock_timeout=111' = ANY (settings) AS setting
FROM risky_migrations.steering ORDER BY migration_id DESC LIMIT 1;
SELECT DISTINCT owner::regrole, pid <> pg_backend_pid() AS elsewhere
FROM risky_migrations.step_log WHERE relid = 'days'::regclass;
RESET DateStyle;
RESET risky_migrations.lock_timeout;
CALL rm_rollback();
-- it begins when the transaction commits: not if it does not, or a part of it
SELECT max(id) AS before FROM rm_migrations \gset
BEGIN;
SELECT rm_start('days', 'v', 'date', 'v::date') > :before AS it;
ROLLBACK;
BEGIN;
SAVEPOINT s;
SELECT rm_start('days', 'v', 'date', 'v::date') > :before AS it;
ROLLBACK TO s;
COMMIT;
SELECT count(*) FROM rm_migrations WHERE id > :before;
BEGIN;
SELECT rm_start('days', 'v', 'text', 'v') > :before AS it;
SELECT * FROM stands;
COMMIT;
CALL wait_for_worker(5);
SELECT * FROM stands;
CALL rm_rollback();
-- its errors are in rm_migrations
SELECT rm_start('days', 'v', 'int', 'v::int') > :before AS it;
CALL wait_for_worker(2, 1);
SELECT * FROM stands;
SELECT message FROM rm_migrations ORDER BY id DESC LIMIT 1;
CALL rm_rollback();
-- what was begun step by step goes on in the background too
CALL rm_add_column('days', 'v', 'text', 'v');
SELECT * FROM stands;
SELECT rm_resume() > :before AS it;
CALL wait_for_worker(5);
SELECT * FROM stands;
CALL rm_rollback();

-- 4. Steering what nobody runs
CALL rm_add_column('days', 'v', 'text', 'v');
SELECT max(id) AS id FROM rm_migrations \gset
SELECT rm_cancel() = :id AS it;
SELECT * FROM stands;
SELECT rm_pause();
\echo SQLSTATE :SQLSTATE
-- a call of a step by hand goes on with what was cancelled
CALL rm_backfill_batched();
SELECT * FROM stands;
SELECT rm_pause() = :id AS it;
SELECT * FROM stands;
SET client_min_messages = notice;
SELECT rm_pause() = :id AS it;
SET client_min_messages = warning;
SELECT rm_resume() = :id AS it;
CALL wait_for_worker(5);
SELECT * FROM stands;
-- and can be taken back; what is taken back is not steered
SELECT rm_pause() = :id AS it;
INSERT INTO risky_migrations.step_log (migration_id, approach, step, direction, state, owner, relid, relation)
SELECT :id, 'three_step', 'enforce_not_null', 'rollback', 'failed', 10, 'days'::regclass, 'days';
SELECT rm_pause();
\echo SQLSTATE :SQLSTATE
SELECT rm_cancel();
\echo SQLSTATE :SQLSTATE
SELECT rm_resume();
\echo SQLSTATE :SQLSTATE
SELECT * FROM stands;
CALL rm_rollback();
SELECT * FROM stands;
SELECT rm_pause(:id);
\echo SQLSTATE :SQLSTATE
SELECT rm_resume(:id);
\echo SQLSTATE :SQLSTATE
SELECT rm_cancel(:id);
\echo SQLSTATE :SQLSTATE

-- 5. Refused, with nothing changed
SELECT max(id) AS before FROM rm_migrations \gset
CALL rm_alter_type(NULL, 'v', 'int');
\echo SQLSTATE :SQLSTATE
CALL rm_alter_type('plain', NULL, 'int');
\echo SQLSTATE :SQLSTATE
CALL rm_alter_type('plain', 'v', '');
\echo SQLSTATE :SQLSTATE
CALL rm_alter_type('plain', 'v', 'int');
\echo SQLSTATE :SQLSTATE
CALL rm_alter_type('no_such', 'v', 'int');
\echo SQLSTATE :SQLSTATE
CALL rm_alter_type('plain', 'v', 'int', 'v::int', NULL);
\echo SQLSTATE :SQLSTATE
CALL rm_alter_type('plain', 'v', 'int', 'v::int', 'magic');
\echo SQLSTATE :SQLSTATE
CALL rm_alter_type('plain', 'v', 'int', 'v::int', cut_over => 'later');
\echo SQLSTATE :SQLSTATE
CALL rm_alter_type('plain', 'v', 'int', 'v::int', cut_over => NULL);
\echo SQLSTATE :SQLSTATE
CALL rm_alter_type('plain', 'v', 'int', 'v::int', 'direct', cut_over => 'manual');
\echo SQLSTATE :SQLSTATE
CALL rm_alter_type('plain', 'v', 'int', 'v::int', on_error => 'ignore');
\echo SQLSTATE :SQLSTATE
CALL rm_alter_type('plain', 'v', 'int', 'v::int', batch => 0);
\echo SQLSTATE :SQLSTATE
CALL rm_alter_type('plain', 'v', 'int', 'v::int', batch => NULL);
\echo SQLSTATE :SQLSTATE
-- nothing can be smuggled into the way back
\set VERBOSITY sqlstate
CALL rm_alter_type('plain', 'v', 'int', 'v::int', 'direct', reverse_expr => 'v::text, ALTER COLUMN id TYPE text');
CALL rm_alter_type('plain', 'v', 'int', 'v::int', 'direct', reverse_expr => 'v::text, id');
CALL rm_alter_type('plain', 'v', 'int', 'v::int', 'direct', reverse_expr => 'v::text; DROP TABLE plain');
\set VERBOSITY default
SELECT rm_start('plain', 'v', 'int', 'v::int', 'magic');
\echo SQLSTATE :SQLSTATE
\set VERBOSITY sqlstate
SELECT rm_start('plain', 'v', 'int', 'v::no_such_type');
\set VERBOSITY default
BEGIN;
CALL rm_alter_type('plain', 'v', 'int', 'v::int');
\echo SQLSTATE :SQLSTATE
ROLLBACK;
BEGIN;
CALL rm_cut_over();
\echo SQLSTATE :SQLSTATE
ROLLBACK;
BEGIN READ ONLY;
SELECT rm_start('plain', 'v', 'int', 'v::int');
\echo SQLSTATE :SQLSTATE
ROLLBACK;
BEGIN READ ONLY;
SELECT rm_pause(1);
\echo SQLSTATE :SQLSTATE
ROLLBACK;
SELECT rm_pause();
\echo SQLSTATE :SQLSTATE
SELECT rm_resume(0);
\echo SQLSTATE :SQLSTATE
SELECT rm_cancel(4711);
\echo SQLSTATE :SQLSTATE
CALL rm_cut_over(4711);
\echo SQLSTATE :SQLSTATE
-- not in what runs with the rights of another, such as an index expression
CREATE FUNCTION public.sneak(int) RETURNS int LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN PERFORM public.rm_start('steering.plain', 'v', 'int', 'v::int'); RETURN $1; END $$;
CREATE INDEX ON plain (public.sneak(id));
\echo SQLSTATE :SQLSTATE
DROP FUNCTION public.sneak;
SET ROLE regress_rm_cannot;
CALL rm_alter_type('plain', 'v', 'int', 'v::int');
\echo SQLSTATE :SQLSTATE
SELECT rm_start('plain', 'v', 'int', 'v::int');
\echo SQLSTATE :SQLSTATE
RESET ROLE;
SELECT count(*) FROM rm_migrations WHERE id > :before;
SELECT count(*) FROM risky_migrations.steering WHERE migration_id > :before;
-- of another's migration nobody may do anything; nor know of it
SET ROLE regress_rm_steers;
CALL rm_add_column('plain', 'v', 'int', 'v::int');
SELECT max(id) AS id FROM rm_migrations \gset
CALL rm_cut_over();
\echo SQLSTATE :SQLSTATE
SET ROLE regress_rm_cannot;
SELECT rm_pause(:id);
\echo SQLSTATE :SQLSTATE
SELECT rm_resume(:id);
\echo SQLSTATE :SQLSTATE
SELECT rm_cancel(:id);
\echo SQLSTATE :SQLSTATE
CALL rm_cut_over(:id);
\echo SQLSTATE :SQLSTATE
CALL risky_migrations.run(:id);
\echo SQLSTATE :SQLSTATE
SELECT rm_pause();
\echo SQLSTATE :SQLSTATE
SET ROLE regress_rm_steers;
SELECT * FROM stands;
-- several are open: which one?
CALL rm_add_column('days', 'v', 'text', 'v');
\set VERBOSITY terse
SELECT rm_pause();
\set VERBOSITY default
\echo SQLSTATE :SQLSTATE
CALL rm_rollback(:id + 1);
CALL rm_rollback(:id);
RESET ROLE;

DROP EXTENSION risky_migrations CASCADE;
DROP VIEW IF EXISTS public.stands;
DROP PROCEDURE public.wait_for_worker;
SET client_min_messages = error;
DROP SCHEMA steering CASCADE;
DROP ROLE regress_rm_steers, regress_rm_cannot;

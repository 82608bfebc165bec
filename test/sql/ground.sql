-- What each transaction of a migration compares before it goes on, one thing at
-- a time with the message that says so; and what it does not take over from
-- the session that runs it.
\set VERBOSITY default
\set SHOW_CONTEXT never
SET client_min_messages = warning;
DROP EXTENSION IF EXISTS risky_migrations CASCADE;
CREATE EXTENSION risky_migrations;
CREATE ROLE regress_rm_owner;
CREATE ROLE regress_rm_other;
CREATE SCHEMA ground;
GRANT ALL ON SCHEMA ground TO regress_rm_owner, regress_rm_other;
SET search_path = ground, public;
CREATE TABLE t (id int PRIMARY KEY, v text NOT NULL, other text NOT NULL DEFAULT '1');
INSERT INTO t SELECT i, i FROM generate_series(1, 100) i;

-- 1. A constraint of somebody else's on the shadow column
CALL rm_add_column('t', 'v', 'int', 'v::int');
ALTER TABLE t ADD CONSTRAINT small CHECK (v_new < 50);
CALL rm_backfill_batched();
ALTER TABLE t DROP CONSTRAINT small;
-- one on other columns is nobody's business
ALTER TABLE t ADD CONSTRAINT other_is_one CHECK (other = '1');
CALL rm_backfill_batched();
ALTER TABLE t ADD CONSTRAINT small CHECK (v_new < 50) NOT VALID;
CALL rm_enforce_not_null();
ALTER TABLE t DROP CONSTRAINT small;
CALL rm_enforce_not_null();
CALL rm_rollback();

-- 2. A column generated from the shadow column
CALL rm_add_column('t', 'v', 'int', 'v::int');
ALTER TABLE t ADD made int GENERATED ALWAYS AS (v_new + 1) STORED;
CALL rm_backfill_batched();
ALTER TABLE t DROP COLUMN made;
CALL rm_backfill_batched();
CALL rm_rollback();

-- 3. A trigger that was made again by hand, and the old column has another type
-- (the shadow column's cannot be changed)
CALL rm_add_column('t', 'v', 'int', 'other::int');
SELECT max(id) AS id, '"~rm_sync_' || max(id) || '"' AS sync FROM rm_migrations \gset
SELECT format('CREATE TRIGGER %1$s BEFORE INSERT OR UPDATE ON t FOR EACH ROW EXECUTE FUNCTION risky_migrations.sync(%2$s);
	ALTER TABLE t ENABLE ALWAYS TRIGGER %1$s', :'sync', :'id') AS make_again \gset
DROP TRIGGER :sync ON t;
ALTER TABLE t ALTER v TYPE varchar(20);
:make_again;
CALL rm_backfill_batched(10, :id);
DROP TRIGGER :sync ON t;
ALTER TABLE t ALTER v TYPE text;
:make_again;
CALL rm_backfill_batched(10, :id);
CALL rm_rollback();
-- the old column is dropped, where the expression does not even read it
CALL rm_add_column('t', 'v', 'int', 'other::int');
ALTER TABLE t DROP COLUMN v;
CALL rm_backfill_batched();
CALL rm_rollback();
ALTER TABLE t ADD v text;
UPDATE t SET v = id;
ALTER TABLE t ALTER v SET NOT NULL;

-- 4. The amount of work is fixed when the trigger is in place, however much is
-- written after that
VACUUM FULL t;
SELECT pg_relation_size('t') / 8192 AS pages, count(*) AS rows FROM t \gset
CALL rm_add_column('t', 'v', 'int', 'v::int');
INSERT INTO t (id, v) SELECT i, i FROM generate_series(1001, 3000) i;
SELECT pg_relation_size('t') / 8192 > 3 * :pages AS has_grown;
CALL rm_backfill_batched();
SELECT end_block = :pages AS as_many_pages, next_block = :pages AS and_no_more, rows_done = :rows AS as_many_rows
FROM risky_migrations.migration ORDER BY id DESC LIMIT 1;
SELECT count(*) FILTER (WHERE v_new IS DISTINCT FROM v::int) AS wrong FROM t;
CALL rm_rollback();
-- and less where the table has shrunk since (a snapshot of autovacuum's may
-- keep it from that for a moment)
CLUSTER t USING t_pkey;
CALL rm_add_column('t', 'v', 'int', 'v::int');
DELETE FROM t WHERE id > 50;
VACUUM t;
SELECT pg_relation_size('t') / 8192 > 1 AS has_not_shrunk \gset
\if :has_not_shrunk
SELECT pg_sleep(5) \g /dev/null
VACUUM t;
\endif
SELECT pg_relation_size('t') / 8192 < end_block AS has_shrunk FROM risky_migrations.migration ORDER BY id DESC LIMIT 1;
CALL rm_backfill_batched();
CALL rm_enforce_not_null();
SELECT count(*), count(*) FILTER (WHERE v_new IS DISTINCT FROM v::int) AS wrong FROM t;
CALL rm_rollback();

-- 5. The runner's transactions are READ COMMITTED and READ WRITE, whatever the
-- session's are by default
CREATE FUNCTION ground.told(text) RETURNS text IMMUTABLE LANGUAGE plpgsql AS $$
BEGIN
	RETURN current_setting('transaction_isolation') || ', ' || current_setting('transaction_deferrable');
END $$;
SET default_transaction_isolation = serializable;
SET default_transaction_deferrable = on;
CALL rm_add_column('t', 'v', 'text', 'told(v)');
CALL rm_backfill_batched();
SELECT DISTINCT v_new FROM t;
CALL rm_rollback();
RESET default_transaction_isolation;
RESET default_transaction_deferrable;

-- 6. statement_timeout does not count the whole CALL, and is back after it
CREATE FUNCTION ground.slow(text) RETURNS text IMMUTABLE LANGUAGE plpgsql AS $$
BEGIN
	PERFORM pg_sleep(0.01);
	RETURN $1;
END $$;
SET statement_timeout = '200 ms';
CALL rm_add_column('t', 'v', 'text', 'slow(v)');
CALL rm_backfill_batched();
CALL rm_enforce_not_null();
SELECT pg_sleep(60);
\echo SQLSTATE :SQLSTATE
RESET statement_timeout;
-- nor does a transaction go on much longer than max_row_lock_time: it looks at
-- the clock every eight rows
SELECT transactions >= rows_changed / 8 AS short_transactions FROM risky_migrations.step_log
WHERE step = 'backfill' ORDER BY id DESC LIMIT 1;
SELECT count(*), count(*) FILTER (WHERE v_new IS DISTINCT FROM v) AS wrong FROM t;
CALL rm_rollback();

-- 7. What is constant in an expression is evaluated as the table's owner too,
-- also in a writer's session
CREATE FUNCTION ground.who(int) RETURNS text IMMUTABLE LANGUAGE plpgsql AS $$ BEGIN RETURN current_user; END $$;
ALTER TABLE t OWNER TO regress_rm_owner;
GRANT ALL ON t TO regress_rm_other;
CALL rm_add_column('t', 'v', 'text', 'v || '' by '' || who(1)');
SET ROLE regress_rm_other;
INSERT INTO t VALUES (5000, '1', '5000');
RESET ROLE;
CALL rm_backfill_batched();
SELECT replace(v_new, v, 'v') AS made, count(*) FROM t GROUP BY 1;
CALL rm_rollback();

-- and a writer need not be allowed to call what the owner may
CREATE FUNCTION ground.secret(text) RETURNS text IMMUTABLE LANGUAGE plpgsql AS $$ BEGIN RETURN $1 || '!'; END $$;
REVOKE ALL ON FUNCTION ground.secret(text) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION ground.secret(text) TO regress_rm_owner;
CALL rm_add_column('t', 'v', 'text', 'secret(v)');
SET ROLE regress_rm_other;
INSERT INTO t VALUES (5001, '1', '5001');
RESET ROLE;
SELECT v_new FROM t WHERE id = 5001;
CALL rm_rollback();

-- 8. An error in the conversion that is not the value's fault (here: lack of
-- space) is raised, and whoever catches it finds his transaction as it was
CREATE FUNCTION ground.faulty(text) RETURNS text IMMUTABLE LANGUAGE plpgsql AS $$
BEGIN
	IF $1 = 'no space' THEN
		RAISE 'no space' USING ERRCODE = 'disk_full';
	ELSIF $1 = 'bad' THEN
		RAISE 'bad value';
	END IF;
	RETURN $1;
END $$;
TRUNCATE t;
INSERT INTO t (id, v) VALUES (1, '1'), (2, 'bad'), (3, 'no space');
CALL rm_add_column('t', 'v', 'text', 'faulty(v)');
DO $$
BEGIN
	INSERT INTO ground.t (id, v) VALUES (4, '4');
	BEGIN
		INSERT INTO ground.t (id, v) VALUES (5, '5');
		INSERT INTO ground.t (id, v) VALUES (6, 'no space');
	EXCEPTION WHEN disk_full THEN
		INSERT INTO ground.t (id, v) VALUES (7, '7');
	END;
	INSERT INTO ground.t (id, v) VALUES (8, '8');
END $$;
SELECT id, v, v_new FROM t ORDER BY id;
CALL rm_backfill_batched();
\echo SQLSTATE :SQLSTATE
SELECT last_step_state, sqlstate FROM rm_migrations ORDER BY id DESC LIMIT 1;
UPDATE t SET v = id WHERE v = 'no space';
CALL rm_backfill_batched();
SELECT id, v, v_new FROM t WHERE v_new IS DISTINCT FROM v;
UPDATE t SET v = 'no space', id = 9 WHERE id = 8;
\echo SQLSTATE :SQLSTATE
ALTER TABLE t DISABLE TRIGGER USER;
UPDATE t SET v = 'no space' WHERE id = 8;
SELECT format('ALTER TABLE t ENABLE ALWAYS TRIGGER "~rm_sync_%s"', max(id)) AS enable FROM rm_migrations \gset
:enable;
CALL rm_enforce_not_null();
\echo SQLSTATE :SQLSTATE
SELECT * FROM rm_check_conversion('t', 'v', 'text', 'faulty(v)');
\echo SQLSTATE :SQLSTATE
UPDATE t SET v = id;
CALL rm_enforce_not_null();
SELECT count(*), count(*) FILTER (WHERE v_new IS DISTINCT FROM v) AS wrong FROM t;
CALL rm_rollback();

-- 9. A function that was inlined is replaced: the next write of the same session
-- knows, and the verification mends what was converted before
CREATE FUNCTION ground.plus(text) RETURNS int IMMUTABLE LANGUAGE sql AS $$ SELECT $1::int $$;
CALL rm_add_column('t', 'v', 'int', 'plus(v)');
INSERT INTO t (id, v) VALUES (10, '10');
CALL rm_backfill_batched();
CREATE OR REPLACE FUNCTION ground.plus(text) RETURNS int IMMUTABLE LANGUAGE sql AS $$ SELECT $1::int + 1 $$;
INSERT INTO t (id, v) VALUES (11, '11');
SELECT v, v_new FROM t WHERE id IN (10, 11) ORDER BY id;
CALL rm_enforce_not_null();
SELECT v, v_new FROM t WHERE id IN (10, 11) ORDER BY id;
CALL rm_rollback();

SET search_path = public;
DROP EXTENSION risky_migrations CASCADE;
DROP SCHEMA ground CASCADE;
DROP ROLE regress_rm_owner, regress_rm_other;

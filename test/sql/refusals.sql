-- Everything that is refused: with SQLSTATE, message, detail and hint, and
-- with nothing changed.
\set VERBOSITY default
\set SHOW_CONTEXT never
SET client_min_messages = warning;
DROP EXTENSION IF EXISTS risky_migrations CASCADE;
CREATE EXTENSION risky_migrations;
CREATE ROLE regress_rm_owner;
CREATE ROLE regress_rm_other;
CREATE SCHEMA refusals AUTHORIZATION regress_rm_owner;
CREATE SCHEMA other AUTHORIZATION regress_rm_other;
SET search_path = refusals, public;
SET ROLE regress_rm_owner;
CREATE TABLE plain (id int PRIMARY KEY, v text, n int NOT NULL DEFAULT 1,
	g int GENERATED ALWAYS AS (n * 2) STORED);
INSERT INTO plain VALUES (1, '10'), (2, '20');
RESET ROLE;

-- everything about the schema's tables that a refusal might have changed
CREATE FUNCTION public.picture() RETURNS text LANGUAGE sql AS $$
	SELECT md5(
		(SELECT string_agg(a::text, ';' ORDER BY a.attrelid, a.attnum) FROM pg_attribute a
			JOIN pg_class c ON c.oid = a.attrelid WHERE c.relnamespace = 'refusals'::regnamespace) ||
		coalesce((SELECT string_agg(format('%s %s', tgrelid, tgname), ';' ORDER BY tgrelid, tgname) FROM pg_trigger
			JOIN pg_class c ON c.oid = tgrelid WHERE c.relnamespace = 'refusals'::regnamespace), '') ||
		coalesce((SELECT string_agg(format('%s %s', conrelid, conname), ';' ORDER BY conrelid, conname)
			FROM pg_constraint WHERE connamespace = 'refusals'::regnamespace), '') ||
		(SELECT string_agg(format('%s %s %s', oid, relname, relfilenode), ';' ORDER BY oid)
			FROM pg_class WHERE relnamespace = 'refusals'::regnamespace) ||
		coalesce((SELECT string_agg(p::text, ';' ORDER BY id) FROM refusals.plain p), ''))
$$;

-- Where the wording is PostgreSQL's own, only the SQLSTATE is shown.

-- 1. Procedures where they could not commit
SELECT public.picture() AS before \gset
BEGIN;
CALL rm_migrate('0001');
\echo SQLSTATE :SQLSTATE
ROLLBACK;
BEGIN;
CALL rm_add_column('plain', 'v', 'int');
\echo SQLSTATE :SQLSTATE
ROLLBACK;
BEGIN;
CALL rm_backfill_batched();
\echo SQLSTATE :SQLSTATE
ROLLBACK;
BEGIN;
CALL rm_enforce_not_null();
\echo SQLSTATE :SQLSTATE
ROLLBACK;
BEGIN;
CALL rm_rollback();
\echo SQLSTATE :SQLSTATE
ROLLBACK;
BEGIN;
CALL rm_compare(10);
\echo SQLSTATE :SQLSTATE
ROLLBACK;
CREATE FUNCTION public.call_it() RETURNS void LANGUAGE plpgsql AS $$ BEGIN CALL rm_migrate('0001'); END $$;
SELECT public.call_it();
\echo SQLSTATE :SQLSTATE
-- a procedure with settings of its own cannot commit either
CREATE PROCEDURE public.call_it_too() LANGUAGE plpgsql SET work_mem = '1MB' AS $$ BEGIN CALL rm_migrate('0001'); END $$;
CALL public.call_it_too();
\echo SQLSTATE :SQLSTATE
-- nor can a block that handles exceptions
DO $$ BEGIN CALL rm_migrate('0001'); EXCEPTION WHEN division_by_zero THEN NULL; END $$;
\echo SQLSTATE :SQLSTATE
SELECT count(*) FROM risky_migrations.step_log;
-- a block or a procedure that may commit may call them
DO $$ BEGIN CALL rm_migrate('0003'); CALL rm_migrate('zero'); END $$;
SELECT step, direction, state FROM risky_migrations.step_log ORDER BY id;

-- 2. Counts and batches
CALL rm_migrate('0001');
SELECT rm_seed(7, 3);
CALL rm_compare(0);
\echo SQLSTATE :SQLSTATE
CALL rm_compare(-1);
\echo SQLSTATE :SQLSTATE
CALL rm_compare(NULL);
\echo SQLSTATE :SQLSTATE
CALL rm_compare(1000000001);
\echo SQLSTATE :SQLSTATE
CALL rm_compare(9223372036854775807);
\echo SQLSTATE :SQLSTATE
CALL rm_compare(10, NULL);
\echo SQLSTATE :SQLSTATE
CALL rm_compare(10, '0 s');
\echo SQLSTATE :SQLSTATE
CALL rm_compare(10, '-1 s');
\echo SQLSTATE :SQLSTATE
CALL rm_compare(10, '1 month');
\echo SQLSTATE :SQLSTATE
CALL rm_compare(10, '20 ms', NULL);
\echo SQLSTATE :SQLSTATE
CALL rm_compare(10, '20 ms', '0 s');
\echo SQLSTATE :SQLSTATE
CALL rm_compare(10, '20 ms', '1 day');
\echo SQLSTATE :SQLSTATE
-- what the probes would refuse is refused before the lab is emptied for it
\set VERBOSITY sqlstate
CALL rm_compare(10, '2 hours');
\set VERBOSITY default
\set VERBOSITY sqlstate
CALL rm_compare(10, '20 ms', '2 hours');
\set VERBOSITY default
\set VERBOSITY sqlstate
CALL rm_compare(10, '0.2 ms');
\set VERBOSITY default
-- the lab is as it was
SELECT applied, number FROM rm_showmigrations();
SELECT rows_checked, rows_wrong FROM rm_lab_check();
CALL rm_migrate('zero');
CALL rm_backfill_batched(0);
\echo SQLSTATE :SQLSTATE
CALL rm_backfill_batched(-1);
\echo SQLSTATE :SQLSTATE
CALL rm_backfill_batched(NULL);
\echo SQLSTATE :SQLSTATE
CALL rm_backfill_batched(9223372036854775807);
\echo SQLSTATE :SQLSTATE
CALL rm_backfill_batched(100, 0);
\echo SQLSTATE :SQLSTATE
CALL rm_backfill_batched(100, -5);
\echo SQLSTATE :SQLSTATE
CALL rm_enforce_not_null(0);
\echo SQLSTATE :SQLSTATE
CALL rm_rollback(-1);
\echo SQLSTATE :SQLSTATE
-- before the lab is there
SELECT rm_seed(10);
\echo SQLSTATE :SQLSTATE
SELECT rm_list_large();
\echo SQLSTATE :SQLSTATE
SELECT * FROM rm_lab_check();
\echo SQLSTATE :SQLSTATE
SELECT risky_migrations.lab_write(10);
\echo SQLSTATE :SQLSTATE
CALL rm_migrate(NULL);
\echo SQLSTATE :SQLSTATE
CALL rm_migrate('');
\echo SQLSTATE :SQLSTATE
CALL rm_migrate('0000');
\echo SQLSTATE :SQLSTATE
CALL rm_migrate('0006');
\echo SQLSTATE :SQLSTATE
CALL rm_migrate('3');
\echo SQLSTATE :SQLSTATE
CALL rm_migrate('0001 ');
\echo SQLSTATE :SQLSTATE
CALL rm_migrate('ZERO');
\echo SQLSTATE :SQLSTATE
CALL rm_migrate('0001');
SELECT rm_seed(7, 3);
SELECT rm_seed(0);
\echo SQLSTATE :SQLSTATE
SELECT rm_seed(-1);
\echo SQLSTATE :SQLSTATE
SELECT rm_seed(NULL);
\echo SQLSTATE :SQLSTATE
SELECT rm_seed(1000000001);
\echo SQLSTATE :SQLSTATE
SELECT rm_seed(9223372036854775807);
\echo SQLSTATE :SQLSTATE
SELECT rm_seed(10, 0);
\echo SQLSTATE :SQLSTATE
SELECT rm_seed(10, -1);
\echo SQLSTATE :SQLSTATE
SELECT rm_seed(10, NULL);
\echo SQLSTATE :SQLSTATE
SELECT rm_seed(10, 9223372036854775807);
\echo SQLSTATE :SQLSTATE
SELECT risky_migrations.lab_write(0);
\echo SQLSTATE :SQLSTATE
SELECT risky_migrations.lab_write(NULL);
\echo SQLSTATE :SQLSTATE
SELECT risky_migrations.lab_moment(0);
\echo SQLSTATE :SQLSTATE
SELECT risky_migrations.lab_moment(9223372036854775807);
\echo SQLSTATE :SQLSTATE
SELECT risky_migrations.lab_moment(-9223372036854775808);
\echo SQLSTATE :SQLSTATE
-- the seed is still there
SELECT rows_checked, rows_wrong FROM rm_lab_check();
CALL rm_migrate('zero');

-- 3. Which table, column, type
SELECT public.picture() AS before \gset
CALL rm_add_column(NULL, 'v', 'int');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('', 'v', 'int');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('plain', NULL, 'int');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('plain', '', 'int');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('plain', 'v', NULL);
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('plain', 'v', '');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('plain', 'v', 'int', '');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('nowhere', 'v', 'int');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('nowhere.plain', 'v', 'int');
\echo SQLSTATE :SQLSTATE
\set VERBOSITY sqlstate
CALL rm_add_column('a.b.c.d', 'v', 'int');
\set VERBOSITY default
\set VERBOSITY sqlstate
CALL rm_add_column('plain; DROP TABLE plain', 'v', 'int');
\set VERBOSITY default
\set VERBOSITY sqlstate
CALL rm_add_column('"plain', 'v', 'int');
\set VERBOSITY default
CALL rm_add_column('plain', 'nothing', 'int');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('plain', 'V', 'int');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('plain', 'ctid', 'int');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('plain', 'v', 'nonsense');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('plain', 'v', 'nowhere.nonsense');
\echo SQLSTATE :SQLSTATE
\set VERBOSITY sqlstate
CALL rm_add_column('plain', 'v', 'int; DROP TABLE plain');
\set VERBOSITY default
\set VERBOSITY sqlstate
CALL rm_add_column('plain', 'v', 'int DEFAULT 5');
\set VERBOSITY default
\set VERBOSITY sqlstate
CALL rm_add_column('plain', 'v', 'int NOT NULL');
\set VERBOSITY default
\set VERBOSITY sqlstate
CALL rm_add_column('plain', 'v', 'varchar(-1)');
\set VERBOSITY default
CALL rm_add_column('plain', 'v', 'serial');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('plain', 'v', 'anyelement');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('plain', 'v', 'trigger');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('plain', 'v', 'record');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('plain', 'v', 'cstring', 'v::cstring');
\echo SQLSTATE :SQLSTATE
-- a composite of the table itself
\set VERBOSITY sqlstate
CALL rm_add_column('plain', 'v', 'plain', 'ROW(1, v, 1, 1)::plain');
\set VERBOSITY default
-- a shell type
CREATE TYPE shell;
\set VERBOSITY sqlstate
CALL rm_add_column('plain', 'v', 'shell');
\set VERBOSITY default
DROP TYPE shell;
SELECT public.picture() = :'before' AS nothing_changed;

-- 4. Which relations
CREATE VIEW a_view AS SELECT * FROM plain;
CREATE MATERIALIZED VIEW a_matview AS SELECT * FROM plain;
CREATE SEQUENCE a_sequence;
CREATE TYPE a_composite AS (v text);
CREATE FOREIGN DATA WRAPPER regress_rm_fdw;
CREATE SERVER regress_rm_server FOREIGN DATA WRAPPER regress_rm_fdw;
CREATE FOREIGN TABLE a_foreign_table (v text) SERVER regress_rm_server;
CREATE TABLE parted (id int, v text) PARTITION BY RANGE (id);
CREATE TABLE part PARTITION OF parted FOR VALUES FROM (0) TO (10);
CREATE TABLE parent (id int, v text);
CREATE TABLE child (w text) INHERITS (parent);
CREATE TABLE grandchild () INHERITS (child);
CREATE TABLE far (id int, v text);
CREATE FOREIGN TABLE far_child () INHERITS (far) SERVER regress_rm_server;
CREATE TABLE of_all (id int, v text);
CREATE TEMP TABLE of_session () INHERITS (of_all);
CREATE TABLE first_parent (v text);
CREATE TABLE second_parent (v text);
CREATE TABLE of_both () INHERITS (first_parent, second_parent);
CREATE TABLE top (v text);
CREATE TABLE left_side () INHERITS (top);
CREATE TABLE right_side () INHERITS (top);
CREATE TABLE bottom () INHERITS (left_side, right_side);
CREATE TABLE owned (v text);
CREATE TABLE owned_by_another () INHERITS (owned);
ALTER TABLE owned_by_another OWNER TO regress_rm_other;
CREATE TABLE name_free (v text);
CREATE TABLE name_new (v_new int) INHERITS (name_free);
CREATE TABLE name_free_too (v text);
CREATE TABLE name_old (v_old int) INHERITS (name_free_too);
CREATE TABLE nullable (v text);
CREATE TABLE not_nullable (v text NOT NULL) INHERITS (nullable);
CREATE TEMP TABLE temporary_table (v text);
CREATE TABLE typed OF a_composite;
CREATE TABLE has_new (v text, v_new text);
CREATE TABLE late_trigger (v text);
CREATE FUNCTION public.noop() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NEW; END $$;
CREATE TRIGGER "~zz" BEFORE UPDATE ON late_trigger FOR EACH ROW EXECUTE FUNCTION noop();
CREATE ACCESS METHOD regress_rm_heap TYPE TABLE HANDLER heap_tableam_handler;
CREATE TABLE other_method (v text) USING regress_rm_heap;
SELECT public.picture() AS before \gset
CALL rm_add_column('a_view', 'v', 'int', 'v::int');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('a_matview', 'v', 'int', 'v::int');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('a_sequence', 'last_value', 'int');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('plain_pkey', 'id', 'int');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('a_composite', 'v', 'int', 'v::int');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('a_foreign_table', 'v', 'int', 'v::int');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('parted', 'id', 'bigint');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('part', 'v', 'int', 'v::int');
\echo SQLSTATE :SQLSTATE
-- by inheritance: what ALTER TABLE refuses, and children that cannot be changed
CALL rm_add_column('child', 'v', 'int', 'v::int');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('grandchild', 'v', 'int', 'v::int');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('far', 'v', 'int', 'v::int');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('of_all', 'v', 'int', 'v::int');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('first_parent', 'v', 'int', 'v::int');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('top', 'v', 'int', 'v::int');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('owned', 'v', 'int', 'v::int');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('name_free', 'v', 'int', 'v::int');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('name_free_too', 'v', 'int', 'v::int');
\echo SQLSTATE :SQLSTATE
CALL rm_alter_type('nullable', 'v', 'int', 'v::int', on_error => 'null');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('temporary_table', 'v', 'int', 'v::int');
\echo SQLSTATE :SQLSTATE
\set VERBOSITY sqlstate
CALL rm_add_column('typed', 'v', 'int', 'v::int');
\set VERBOSITY default
CALL rm_add_column('plain', 'g', 'bigint');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('plain', 'g', 'bigint', 'n::bigint');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('has_new', 'v', 'int', 'v::int');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('late_trigger', 'v', 'int', 'v::int');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('other_method', 'v', 'int', 'v::int');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('pg_catalog.pg_class', 'reltuples', 'float8');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('risky_migrations.migration', 'phase', 'bigint');
\echo SQLSTATE :SQLSTATE
SELECT public.picture() = :'before' AS nothing_changed;
-- a trigger that fires last but does not change rows is no obstacle: after, or of statements
DROP TRIGGER "~zz" ON late_trigger;
CREATE TRIGGER "~zz" AFTER UPDATE ON late_trigger FOR EACH ROW EXECUTE FUNCTION noop();
CREATE TRIGGER "~zzz" BEFORE UPDATE ON late_trigger FOR EACH STATEMENT EXECUTE FUNCTION noop();
CALL rm_add_column('late_trigger', 'v', 'int', 'v::int');
\echo SQLSTATE :SQLSTATE
CALL rm_rollback();
\echo SQLSTATE :SQLSTATE

-- 5. The expression
SELECT public.picture() AS before \gset
CREATE FUNCTION public.volatile_f(text) RETURNS int VOLATILE LANGUAGE sql AS 'SELECT $1::int';
CREATE FUNCTION public.stable_f(text) RETURNS int STABLE LANGUAGE sql AS 'SELECT $1::int';
CREATE FUNCTION public.immutable_f(text) RETURNS int IMMUTABLE LANGUAGE sql AS 'SELECT $1::int';
CREATE FUNCTION public.set_f(text) RETURNS SETOF int IMMUTABLE LANGUAGE sql AS 'SELECT $1::int';
CREATE FUNCTION public.now(text) RETURNS int IMMUTABLE LANGUAGE sql AS 'SELECT $1::int';
CALL rm_add_column('plain', 'v', 'int');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('plain', 'v', 'int', 'v::jsonb');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('plain', 'v', 'int', 'v::int, 2');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('plain', 'v', 'int', '*');
\echo SQLSTATE :SQLSTATE
\set VERBOSITY sqlstate
CALL rm_add_column('plain', 'v', 'int', 'v::int; DROP TABLE plain');
\set VERBOSITY default
\set VERBOSITY sqlstate
CALL rm_add_column('plain', 'v', 'int', 'v::int) ; DROP TABLE plain; --');
\set VERBOSITY default
CALL rm_add_column('plain', 'v', 'int', 'v::int FROM plain');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('plain', 'v', 'int', 'v::int WHERE true');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('plain', 'v', 'int', 'v::int AS x');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('plain', 'v', 'int', 'v::int ORDER BY 1');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('plain', 'v', 'int', 'v::int LIMIT 1');
\echo SQLSTATE :SQLSTATE
\set VERBOSITY sqlstate
CALL rm_add_column('plain', 'v', 'int', 'v::int UNION SELECT 1');
\set VERBOSITY default
CALL rm_add_column('plain', 'v', 'int', 'DISTINCT v::int');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('plain', 'v', 'int', 'v::int FOR UPDATE');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('plain', 'v', 'int', '-- v');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('plain', 'v', 'int', '   ');
\echo SQLSTATE :SQLSTATE
\set VERBOSITY sqlstate
CALL rm_add_column('plain', 'v', 'int', 'v::int +');
\set VERBOSITY default
\set VERBOSITY sqlstate
CALL rm_add_column('plain', 'v', 'int', '$1');
\set VERBOSITY default
\set VERBOSITY sqlstate
CALL rm_add_column('plain', 'v', 'int', 'nothing::int');
\set VERBOSITY default
\set VERBOSITY sqlstate
CALL rm_add_column('plain', 'v', 'int', 'has_new.v::int');
\set VERBOSITY default
\set VERBOSITY sqlstate
CALL rm_add_column('plain', 'v', 'int', '(SELECT 1)');
\set VERBOSITY default
\set VERBOSITY sqlstate
CALL rm_add_column('plain', 'v', 'int', 'CASE WHEN EXISTS (SELECT FROM has_new) THEN 1 END');
\set VERBOSITY default
\set VERBOSITY sqlstate
CALL rm_add_column('plain', 'v', 'int', 'max(n)');
\set VERBOSITY default
\set VERBOSITY sqlstate
CALL rm_add_column('plain', 'v', 'int', 'row_number() OVER ()');
\set VERBOSITY default
\set VERBOSITY sqlstate
CALL rm_add_column('plain', 'v', 'int', 'generate_series(1, 2)');
\set VERBOSITY default
\set VERBOSITY sqlstate
CALL rm_add_column('plain', 'v', 'int', 'set_f(v)');
\set VERBOSITY default
CALL rm_add_column('plain', 'v', 'int', 'volatile_f(v)');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('plain', 'v', 'int', 'stable_f(v)');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('plain', 'v', 'int', 'random()::int');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('plain', 'v', 'int', 'nextval(''a_sequence'')');
\echo SQLSTATE :SQLSTATE
\set VERBOSITY sqlstate
CALL rm_add_column('plain', 'v', 'int', 'nowhere(v)');
\set VERBOSITY default
CALL rm_add_column('plain', 'v', 'timestamptz', 'now()');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('plain', 'v', 'timestamptz', 'clock_timestamp()');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('plain', 'v', 'timestamptz', 'CURRENT_TIMESTAMP');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('plain', 'v', 'date', 'coalesce(v::date, CURRENT_DATE)');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('plain', 'v', 'text', 'LOCALTIME::text');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('plain', 'v', 'interval', 'age(v::timestamp)');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('plain', 'v', 'name', 'current_user');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('plain', 'v', 'name', 'session_user');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('plain', 'v', 'name', 'current_schema');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('plain', 'v', 'text', 'current_setting(''TimeZone'') || v');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('plain', 'v', 'int', 'pg_backend_pid()');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('plain', 'v', 'text', 'ctid::text');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('plain', 'v', 'text', 'xmin::text');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('plain', 'v', 'oid', 'tableoid');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('plain', 'v', 'text', 'plain::text');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('plain', 'v', 'text', '(plain.*)::text');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('plain', 'v', 'jsonb', 'to_jsonb(plain)');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('plain', 'v', 'int', 'g + v::int');
\echo SQLSTATE :SQLSTATE
SELECT public.picture() = :'before' AS nothing_changed;
-- a schema's own now() is an ordinary function
CREATE TABLE steady (id int PRIMARY KEY, v text NOT NULL);
CALL rm_add_column('steady', 'v', 'int', 'public.now(v)');
\echo SQLSTATE :SQLSTATE
CALL rm_rollback();
\echo SQLSTATE :SQLSTATE
DROP TABLE steady;
SELECT public.picture() AS before \gset

-- 6. Whose table
SET ROLE regress_rm_other;
\set VERBOSITY sqlstate
CALL rm_add_column('refusals.plain', 'v', 'int', 'v::int');
\set VERBOSITY default
RESET ROLE;
GRANT USAGE ON SCHEMA refusals TO regress_rm_other;
GRANT ALL ON plain TO regress_rm_other;
SET ROLE regress_rm_other;
CALL rm_add_column('refusals.plain', 'v', 'int', 'v::int');
\echo SQLSTATE :SQLSTATE
RESET ROLE;
-- owner of the table, but without the right to create in its schema or to use the type
CREATE TABLE other.theirs (v text);
ALTER TABLE other.theirs OWNER TO regress_rm_owner;
CREATE TYPE public.mood AS ENUM ('sad', 'ok');
REVOKE USAGE ON TYPE public.mood FROM PUBLIC;
GRANT USAGE ON SCHEMA other TO regress_rm_owner;
SET ROLE regress_rm_owner;
\set VERBOSITY sqlstate
CALL rm_add_column('other.theirs', 'v', 'public.mood', 'v::public.mood');
\set VERBOSITY default
RESET ROLE;
SELECT public.picture() = :'before' AS nothing_changed;

-- 7. Which migration
CALL rm_backfill_batched();
\echo SQLSTATE :SQLSTATE
CALL rm_enforce_not_null();
\echo SQLSTATE :SQLSTATE
CALL rm_rollback();
\echo SQLSTATE :SQLSTATE
CALL rm_backfill_batched(10, 4711);
\echo SQLSTATE :SQLSTATE
CALL rm_enforce_not_null(4711);
\echo SQLSTATE :SQLSTATE
CALL rm_rollback(4711);
\echo SQLSTATE :SQLSTATE
CREATE TABLE one (v text NOT NULL);
CREATE TABLE two (v text NOT NULL);
CALL rm_add_column('one', 'v', 'int', 'v::int');
SELECT max(id) AS one FROM rm_migrations \gset
CALL rm_add_column('one', 'v', 'bigint', 'v::bigint');
\echo SQLSTATE :SQLSTATE
CALL rm_alter_type('one', 'v_new', 'bigint', method => 'direct');
\echo SQLSTATE :SQLSTATE
CALL rm_enforce_not_null();
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('two', 'v', 'int', 'v::int');
SELECT max(id) AS two FROM rm_migrations \gset
CALL rm_backfill_batched();
\echo SQLSTATE :SQLSTATE
CALL rm_enforce_not_null();
\echo SQLSTATE :SQLSTATE
CALL rm_rollback();
\echo SQLSTATE :SQLSTATE
-- another role sees nothing to choose from, and may not touch it by its id
SET ROLE regress_rm_other;
CALL rm_backfill_batched();
\echo SQLSTATE :SQLSTATE
CALL rm_rollback();
\echo SQLSTATE :SQLSTATE
CALL rm_backfill_batched(10, :one);
\echo SQLSTATE :SQLSTATE
CALL rm_enforce_not_null(:one);
\echo SQLSTATE :SQLSTATE
CALL rm_rollback(:one);
\echo SQLSTATE :SQLSTATE
RESET ROLE;
CALL rm_backfill_batched(10, :one);
CALL rm_rollback(:one);
CALL rm_backfill_batched(10, :one);
\echo SQLSTATE :SQLSTATE
CALL rm_enforce_not_null(:one);
\echo SQLSTATE :SQLSTATE
CALL rm_rollback(:two);
DROP TABLE one, two;

-- 8. The lab
-- no schema to be in
SET search_path = nowhere;
CALL public.rm_migrate('0001');
\echo SQLSTATE :SQLSTATE
SELECT public.rm_seed(10);
\echo SQLSTATE :SQLSTATE
SET search_path = refusals, public;
-- a table of that name that is not the lab's own
CREATE TABLE large_record (precious text);
INSERT INTO large_record VALUES ('do not touch');
CALL rm_migrate('0001');
\echo SQLSTATE :SQLSTATE
CALL rm_migrate('0005');
\echo SQLSTATE :SQLSTATE
CALL rm_compare(10);
\echo SQLSTATE :SQLSTATE
SELECT rm_seed(10);
\echo SQLSTATE :SQLSTATE
SELECT rm_list_large();
\echo SQLSTATE :SQLSTATE
CALL rm_migrate('zero');
\echo SQLSTATE :SQLSTATE
SELECT * FROM large_record;
SELECT to_regclass('small_record');
DROP TABLE large_record;
CREATE VIEW small_record AS SELECT 1;
CALL rm_migrate('0003');
\echo SQLSTATE :SQLSTATE
SELECT to_regclass('large_record');
DROP VIEW small_record;
-- one that took the place of the lab's own; the message names it
CALL rm_migrate('0003');
ALTER TABLE large_record RENAME TO large_record_away;
CREATE TABLE large_record (precious text);
SELECT rm_seed(10);
\echo SQLSTATE :SQLSTATE
CALL rm_migrate('0005');
\echo SQLSTATE :SQLSTATE
CALL rm_migrate('0001');
\echo SQLSTATE :SQLSTATE
DROP TABLE large_record;
ALTER TABLE large_record_away RENAME TO large_record;
CALL rm_migrate('zero');
-- somebody else's lab
SET ROLE regress_rm_owner;
CALL rm_migrate('0001');
RESET ROLE;
GRANT ALL ON small_record, large_record TO regress_rm_other;
SET ROLE regress_rm_other;
CALL rm_migrate('0002');
\echo SQLSTATE :SQLSTATE
CALL rm_migrate('0003');
\echo SQLSTATE :SQLSTATE
CALL rm_migrate('zero');
\echo SQLSTATE :SQLSTATE
CALL rm_compare(10);
\echo SQLSTATE :SQLSTATE
SELECT rm_seed(10);
\echo SQLSTATE :SQLSTATE
RESET ROLE;
SELECT applied, number FROM rm_showmigrations();
-- a role that may not create tables
CREATE SCHEMA closed;
GRANT USAGE ON SCHEMA closed TO regress_rm_other;
SET ROLE regress_rm_other;
SET search_path = closed, public;
\set VERBOSITY sqlstate
CALL rm_migrate('0001');
\set VERBOSITY default
RESET ROLE;
SET search_path = refusals, public;

-- 9. Values that do not convert
CREATE FUNCTION public.strings() RETURNS text LANGUAGE sql AS $$
	SELECT md5(string_agg(x.t, ';' ORDER BY x.t)) FROM (
		SELECT 's' || s::text FROM small_record s UNION ALL SELECT 'l' || l::text FROM large_record l) x (t)
$$;
CREATE VIEW public.types AS SELECT attrelid::regclass::text, atttypid::regtype FROM pg_attribute
WHERE attname = 'created_at' AND attrelid IN (to_regclass('refusals.small_record'), to_regclass('refusals.large_record'));
SELECT rm_seed(5);
UPDATE large_record SET created_at = 'not a date' WHERE id = 3;
SELECT public.strings() AS before \gset
CALL rm_migrate('0002');
\echo SQLSTATE :SQLSTATE
SELECT public.strings() = :'before' AS nothing_changed;
SELECT applied, number FROM rm_showmigrations();
SELECT * FROM types ORDER BY 1;
-- also if the small table holds strings that could not be made again from timestamps
UPDATE small_record SET created_at = 'Jan 3 2024' WHERE id = 5;
SELECT public.strings() AS before \gset
CALL rm_migrate('0002');
\echo SQLSTATE :SQLSTATE
SELECT public.strings() = :'before' AS nothing_changed;
SELECT * FROM types ORDER BY 1;
DO $$ BEGIN
	-- go on from where it should be, wherever it is
	IF EXISTS (SELECT FROM types WHERE atttypid = 'timestamp'::regtype) THEN
		PERFORM rm_seed(5);
		CALL rm_migrate('0001');
	END IF;
END $$;
UPDATE small_record SET created_at = risky_migrations.lab_moment(id);
-- in the small table
UPDATE large_record SET created_at = risky_migrations.lab_moment(id);
UPDATE small_record SET created_at = '2024-01-01 99:00:00' WHERE id = 77;
CALL rm_migrate('0002');
\echo SQLSTATE :SQLSTATE
UPDATE small_record SET created_at = risky_migrations.lab_moment(id);
-- the clock's own words do convert, to something else every time
UPDATE large_record SET created_at = 'today' WHERE id = 4;
CALL rm_migrate('0005');
\echo SQLSTATE :SQLSTATE
SELECT applied, number FROM rm_showmigrations();
SELECT row_key, value, sqlstate, message FROM rm_conversion_errors;
UPDATE large_record SET created_at = risky_migrations.lab_moment(id);
CALL rm_migrate('0005');
SELECT * FROM rm_lab_check();
-- enforced: now a write that the changed table would refuse is refused
INSERT INTO large_record (name, created_at) VALUES ('x', 'not a date');
\echo SQLSTATE :SQLSTATE
UPDATE large_record SET created_at = 'tomorrow' WHERE id = 1;
\echo SQLSTATE :SQLSTATE
SELECT * FROM rm_lab_check();
CALL rm_migrate('0001');

-- 10. The way back from 0002
UPDATE large_record SET created_at = 'Jan 3 2024' WHERE id IN (2, 3);
UPDATE large_record SET created_at = '2024-01-01T10:00:00' WHERE id = 4;
CALL rm_migrate('0002');
SELECT public.picture() AS before \gset
CALL rm_migrate('0001');
\echo SQLSTATE :SQLSTATE
CALL rm_migrate('0004');
\echo SQLSTATE :SQLSTATE
SELECT public.picture() = :'before' AS nothing_changed;
SELECT applied, number FROM rm_showmigrations();
-- the seed replaces those rows
SELECT rm_seed(5);
CALL rm_migrate('0001');
SELECT * FROM rm_lab_check();
-- written since, and of no such form
CALL rm_migrate('0002');
UPDATE large_record SET created_at = '2024-01-01 10:00:00.25' WHERE id = 1;
UPDATE large_record SET created_at = 'infinity' WHERE id = 2;
SELECT public.picture() AS before \gset
CALL rm_migrate('0003');
\echo SQLSTATE :SQLSTATE
SELECT public.picture() = :'before' AS nothing_changed;
UPDATE large_record SET created_at = risky_migrations.lab_moment(id)::timestamp;
-- of the small table: the large one must not have been changed back by then
UPDATE small_record SET created_at = '0044-03-15 12:00:00 BC' WHERE id = 9;
CALL rm_migrate('0001');
\echo SQLSTATE :SQLSTATE
SELECT applied, number FROM rm_showmigrations();
SELECT * FROM types ORDER BY 1;
UPDATE small_record SET created_at = risky_migrations.lab_moment(id)::timestamp;
CALL rm_migrate('0001');
SELECT * FROM rm_lab_check();
CALL rm_migrate('zero');

-- 11. Probes
SELECT rm_probe_start(NULL);
\echo SQLSTATE :SQLSTATE
SELECT rm_probe_start('');
\echo SQLSTATE :SQLSTATE
SELECT rm_probe_start('  -- nothing');
\echo SQLSTATE :SQLSTATE
SELECT rm_probe_start('SELECT 1; SELECT 2');
\echo SQLSTATE :SQLSTATE
\set VERBOSITY sqlstate
SELECT rm_probe_start('SELEC 1');
\set VERBOSITY default
SELECT rm_probe_start('SELECT 1', NULL);
\echo SQLSTATE :SQLSTATE
SELECT rm_probe_start('SELECT 1', '0 s');
\echo SQLSTATE :SQLSTATE
SELECT rm_probe_start('SELECT 1', '-1 s');
\echo SQLSTATE :SQLSTATE
SELECT rm_probe_start('SELECT 1', '1 month');
\echo SQLSTATE :SQLSTATE
SELECT rm_probe_start('SELECT 1', '1000000 years');
\echo SQLSTATE :SQLSTATE
SELECT rm_probe_start('SELECT 1', '10 ms', NULL);
\echo SQLSTATE :SQLSTATE
SELECT rm_probe_start('SELECT 1', '10 ms', '0 s');
\echo SQLSTATE :SQLSTATE
SELECT rm_probe_start('SELECT 1', '10 ms', '-1 s');
\echo SQLSTATE :SQLSTATE
SELECT rm_probe_start('SELECT 1', '10 ms', '1 year');
\echo SQLSTATE :SQLSTATE
SELECT rm_probe_start('SELECT 1', '10 ms', '1 s', NULL);
\echo SQLSTATE :SQLSTATE
SELECT rm_probe_start('SELECT 1', '10 ms', '1 s', '0 s');
\echo SQLSTATE :SQLSTATE
SELECT rm_probe_start('SELECT 1', '10 ms', '1 s', '-1 s');
\echo SQLSTATE :SQLSTATE
SELECT rm_probe_start('COMMIT');
\echo SQLSTATE :SQLSTATE
SELECT rm_probe_start('COPY plain FROM STDIN');
\echo SQLSTATE :SQLSTATE
SELECT rm_probe_stop(NULL);
\echo SQLSTATE :SQLSTATE
SELECT rm_probe_stop(0);
\echo SQLSTATE :SQLSTATE
SELECT rm_probe_stop(-1);
\echo SQLSTATE :SQLSTATE
SELECT rm_probe_stop(4711);
\echo SQLSTATE :SQLSTATE
-- none was started; then one, of which others know nothing
SELECT count(*) FROM risky_migrations.probe;
SELECT rm_probe_start('SELECT 1', '1 s') AS probe \gset
SET ROLE regress_rm_other;
SELECT count(*) FROM rm_probes;
\set VERBOSITY sqlstate
SELECT rm_probe_stop(:probe);
\set VERBOSITY default
RESET ROLE;
SELECT rm_probe_stop(:probe) >= 0 AS stopped;
\set VERBOSITY sqlstate
SELECT rm_probe_stop(:probe) >= 0 AS stopped_before;
\set VERBOSITY default

-- 12. The settings
\set VERBOSITY sqlstate
SET risky_migrations.lock_timeout = 0;
\set VERBOSITY default
\set VERBOSITY sqlstate
SET risky_migrations.lock_timeout = -1;
\set VERBOSITY default
\set VERBOSITY sqlstate
SET risky_migrations.lock_timeout = '2 min';
\set VERBOSITY default
\set VERBOSITY sqlstate
SET risky_migrations.lock_retries = -1;
\set VERBOSITY default
\set VERBOSITY sqlstate
SET risky_migrations.max_row_lock_time = 0;
\set VERBOSITY default
\set VERBOSITY sqlstate
SET risky_migrations.workers = 0;
\set VERBOSITY default
\set VERBOSITY sqlstate
SET risky_migrations.workers = 17;
\set VERBOSITY default
\set VERBOSITY sqlstate
SET risky_migrations.lock_retry_max_delay = 0;
\set VERBOSITY default
\set VERBOSITY sqlstate
SET risky_migrations.no_such_setting = 1;
\set VERBOSITY default

-- 13. The sync trigger's function elsewhere
CREATE TABLE elsewhere (v text);
CREATE TRIGGER t BEFORE INSERT ON elsewhere FOR EACH ROW EXECUTE FUNCTION risky_migrations.sync();
INSERT INTO elsewhere VALUES ('x');
\echo SQLSTATE :SQLSTATE
DROP TRIGGER t ON elsewhere;
CREATE TRIGGER t BEFORE INSERT ON elsewhere FOR EACH ROW EXECUTE FUNCTION risky_migrations.sync('x');
\set VERBOSITY sqlstate
INSERT INTO elsewhere VALUES ('x');
\set VERBOSITY default
DROP TRIGGER t ON elsewhere;
CREATE TRIGGER t AFTER INSERT ON elsewhere FOR EACH ROW EXECUTE FUNCTION risky_migrations.sync('1');
INSERT INTO elsewhere VALUES ('x');
\echo SQLSTATE :SQLSTATE
DROP TRIGGER t ON elsewhere;
CREATE TRIGGER t BEFORE DELETE ON elsewhere FOR EACH ROW EXECUTE FUNCTION risky_migrations.sync('1');
INSERT INTO elsewhere VALUES ('x');
DELETE FROM elsewhere;
\echo SQLSTATE :SQLSTATE
DROP TRIGGER t ON elsewhere;
-- of a migration that does not exist, or of another table: the row is left alone
CREATE TRIGGER t BEFORE INSERT ON elsewhere FOR EACH ROW EXECUTE FUNCTION risky_migrations.sync('4711');
INSERT INTO elsewhere VALUES ('y') RETURNING *;
SELECT risky_migrations.sync();
\echo SQLSTATE :SQLSTATE

-- 14. Domains: ADD COLUMN of one that has constraints would write the whole
-- table anew under ACCESS EXCLUSIVE
CREATE DOMAIN positive AS int CHECK (VALUE > 0);
CREATE DOMAIN not_null AS int NOT NULL;
CREATE DOMAIN two_deep AS positive;
CREATE DOMAIN unconstrained AS int;
CREATE TABLE domained (a text, b text, c text, d text);
INSERT INTO domained VALUES ('1', '2', '3', '4');
\set VERBOSITY sqlstate
CALL rm_add_column('domained', 'a', 'positive', 'a::int');
\set VERBOSITY default
\set VERBOSITY sqlstate
CALL rm_add_column('domained', 'b', 'not_null', 'b::int');
\set VERBOSITY default
\set VERBOSITY sqlstate
CALL rm_add_column('domained', 'c', 'two_deep', 'c::int');
\set VERBOSITY default
\set VERBOSITY sqlstate
CALL rm_add_column('domained', 'd', 'unconstrained', 'd::int');
\set VERBOSITY default
SELECT step, rewritten FROM rm_lock_report() WHERE relation = 'refusals.domained' AND lock_mode = 'AccessExclusiveLock';
SELECT * FROM domained;
-- and a cast that PostgreSQL has put in by itself would be written out, and fail
CREATE TABLE cast_inside (id int PRIMARY KEY, v unconstrained);
CREATE VIEW cast_view AS SELECT id FROM cast_inside WHERE v > 5;
CALL rm_add_column('cast_inside', 'v', 'bigint');
\echo SQLSTATE :SQLSTATE
CREATE OR REPLACE VIEW cast_view AS SELECT id FROM cast_inside WHERE v::bigint > 5;
CALL rm_add_column('cast_inside', 'v', 'bigint');
DROP TABLE cast_inside CASCADE;
DROP TABLE domained CASCADE;

-- 15. Looking beforehand is refused the same things, and changes nothing
SELECT * FROM rm_check_conversion(NULL, 'v', 'int');
\echo SQLSTATE :SQLSTATE
SELECT * FROM rm_check_conversion('nowhere', 'v', 'int');
\echo SQLSTATE :SQLSTATE
SELECT * FROM rm_check_conversion('plain', 'nothing', 'int');
\echo SQLSTATE :SQLSTATE
SELECT * FROM rm_check_conversion('plain', 'v', 'nonsense');
\echo SQLSTATE :SQLSTATE
SELECT * FROM rm_check_conversion('plain', 'v', 'int', 'v::int, 2');
\echo SQLSTATE :SQLSTATE
SELECT * FROM rm_check_conversion('plain', 'v', 'int', '*');
\echo SQLSTATE :SQLSTATE
SELECT * FROM rm_check_conversion('plain', 'v', 'int', 'volatile_f(v)');
\echo SQLSTATE :SQLSTATE
SELECT * FROM rm_check_conversion('plain', 'v', 'int', 'v::int', 0);
\echo SQLSTATE :SQLSTATE
SELECT * FROM rm_check_conversion('plain', 'v', 'int', 'v::int', -1);
\echo SQLSTATE :SQLSTATE
SELECT * FROM rm_check_conversion('plain', 'v', 'int', 'v::int', NULL);
\echo SQLSTATE :SQLSTATE
SELECT * FROM rm_check_conversion('plain', 'v', 'int', 'v::int', 9223372036854775807);
\echo SQLSTATE :SQLSTATE
SET ROLE regress_rm_other;
SELECT * FROM rm_check_conversion('other.theirs', 'v', 'int', 'v::int');
\echo SQLSTATE :SQLSTATE
RESET ROLE;
-- what is not refused: the rows, and none if all convert
UPDATE plain SET v = 'bad' WHERE id = 2;
SELECT public.picture() AS before \gset
SELECT * FROM rm_check_conversion('plain', 'v', 'int', 'v::int');
SELECT * FROM rm_check_conversion('plain', 'v', 'text');
SELECT public.picture() = :'before' AS nothing_changed;

-- 16. Where the message is PostgreSQL's own, detail and hint are ours, and the
-- position is one in what was given
CREATE FUNCTION refused(statement text, OUT state text, OUT detail text, OUT hint text) LANGUAGE plpgsql AS $$
BEGIN
	EXECUTE statement;
	detail := 'not refused';
EXCEPTION WHEN OTHERS THEN
	GET STACKED DIAGNOSTICS state = RETURNED_SQLSTATE, detail = PG_EXCEPTION_DETAIL, hint = PG_EXCEPTION_HINT;
END $$;
\x on
-- types
SELECT r.* FROM unnest('{setof int,varchar(0),"varchar(1,2)",int int,"numeric(2000)","timestamp(",int; DROP TABLE plain,plain.v%TYPE,nowhere.nonsense,"","int[","int4(3)"}'::text[]) t (given),
	refused(format('SELECT * FROM rm_check_conversion(''plain'', ''v'', %L, ''v'')', given)) r;
-- expressions
SELECT r.* FROM unnest('{v::,v +,nothing,nowhere(v),v::nonsense,"''x''::int",(SELECT 1),"count(v)","v::int; DROP TABLE plain","v COLLATE nowhere",$1,"row_number() OVER ()","1/0"}'::text[]) t (given),
	refused(format('SELECT * FROM rm_check_conversion(''plain'', ''v'', ''int'', %L)', given)) r;
-- relations
SELECT r.* FROM unnest('{" ",a.b.c.d,otherdb.refusals.plain,"pla\"in",plain.}'::text[]) t (given),
	refused(format('SELECT * FROM rm_check_conversion(%L, ''v'', ''int'')', given)) r;
-- probes
SELECT r.* FROM unnest('{SELEC 1,SELECT (}'::text[]) t (given), refused(format('SELECT rm_probe_start(%L)', given)) r;
\x off
CALL rm_add_column('plain', 'v', 'int', 'v::int + nothing');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('plain', 'v', 'numeric(10', 'v::int');
\echo SQLSTATE :SQLSTATE
SELECT public.picture() = :'before' AS nothing_changed;
-- one migration in a tree at a time
CALL rm_add_column('parent', 'v', 'int', 'v::int');
CALL rm_add_column('child', 'w', 'int', 'w::int');
\echo SQLSTATE :SQLSTATE
CALL rm_rollback();
CALL rm_add_column('child', 'w', 'int', 'w::int');
CALL rm_add_column('parent', 'v', 'int', 'v::int');
\echo SQLSTATE :SQLSTATE
-- children that come meanwhile and cannot be changed
CALL rm_rollback();
CALL rm_add_column('parent', 'v', 'int', 'v::int');
CALL rm_backfill_batched();
CREATE FOREIGN TABLE late_foreign () INHERITS (parent) SERVER regress_rm_server;
CALL rm_enforce_not_null();
\echo SQLSTATE :SQLSTATE
DROP FOREIGN TABLE late_foreign;
CALL rm_enforce_not_null();
CREATE TABLE late_parent (v text);
CREATE TABLE late_child () INHERITS (parent, late_parent);
CALL rm_swap();
\echo SQLSTATE :SQLSTATE
DROP TABLE late_child;
CALL rm_rollback();
DROP FUNCTION refused(text);

-- whatever was refused after its step had begun is in the log as failed, and
-- nothing is left running
SELECT DISTINCT approach, step, direction, sqlstate FROM risky_migrations.step_log
WHERE state = 'failed' ORDER BY 1, 2, 3, 4;
SELECT count(*) FROM risky_migrations.step_log WHERE state = 'running';
SELECT count(*) FROM pg_locks WHERE locktype = 'advisory';

SET search_path = public;
DROP EXTENSION risky_migrations CASCADE;
DROP VIEW types;
DROP FUNCTION strings;
DROP SCHEMA refusals, other, closed CASCADE;
DROP FUNCTION picture, call_it, noop, volatile_f, stable_f, immutable_f, set_f, now(text);
DROP PROCEDURE call_it_too;
DROP TYPE mood;
DROP FOREIGN DATA WRAPPER regress_rm_fdw CASCADE;
DROP ACCESS METHOD regress_rm_heap;
DROP ROLE regress_rm_owner, regress_rm_other;

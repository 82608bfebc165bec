-- Who may call what, who sees what, and whose rights other people's code gets.
\set ON_ERROR_STOP 1
\set QUIET 1
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS pgtap;
CREATE EXTENSION risky_migrations;
-- alice owns tables and migrates them; bob is an ordinary role; carol is a
-- member of alice
CREATE ROLE rm_tap_alice;
CREATE ROLE rm_tap_bob;
CREATE ROLE rm_tap_carol IN ROLE rm_tap_alice;
CREATE SCHEMA alice AUTHORIZATION rm_tap_alice;
CREATE SCHEMA bob AUTHORIZATION rm_tap_bob;
SELECT no_plan();

-----------------------------------------------------------------------
-- Privileges as the catalogs tell them
-----------------------------------------------------------------------

CREATE TEMP VIEW member AS
SELECT d.classid::regclass::text AS catalog, d.objid, i.type, i.schema, i.name, i.identity
FROM pg_depend d, LATERAL pg_identify_object(d.classid, d.objid, d.objsubid) i
WHERE d.refclassid = 'pg_extension'::regclass AND d.deptype = 'e'
	AND d.refobjid = (SELECT oid FROM pg_extension WHERE extname = 'risky_migrations');

SELECT is_empty($$SELECT m.identity FROM member m WHERE m.catalog = 'pg_proc'
	AND NOT has_function_privilege('rm_tap_bob', m.objid, 'EXECUTE')$$, 'an ordinary role may call every function and procedure');
SELECT is_empty($$SELECT m.identity FROM member m WHERE m.type = 'view'
	AND NOT has_table_privilege('rm_tap_bob', m.objid, 'SELECT')$$, 'and read every view');
SELECT is_empty($$SELECT m.identity, p FROM member m,
	unnest(ARRAY['INSERT', 'UPDATE', 'DELETE', 'TRUNCATE', 'REFERENCES', 'TRIGGER']) p
	WHERE m.type = 'view' AND has_table_privilege('rm_tap_bob', m.objid, p)$$, 'but write none');
SELECT is_empty($$SELECT m.identity, p FROM member m,
	unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE', 'TRUNCATE', 'REFERENCES', 'TRIGGER']) p
	WHERE m.type = 'table' AND (has_table_privilege('rm_tap_bob', m.objid, p)
		OR p <> 'DELETE' AND p <> 'TRUNCATE' AND p <> 'TRIGGER' AND has_any_column_privilege('rm_tap_bob', m.objid, p))$$,
	'it has no right to any table of the state');
SELECT is_empty($$SELECT c.relname, p FROM pg_class c, unnest(ARRAY['SELECT', 'USAGE', 'UPDATE']) p
	WHERE c.relnamespace = 'risky_migrations'::regnamespace AND c.relkind = 'S'
	AND has_sequence_privilege('rm_tap_bob', c.oid, p)$$, 'nor to its sequences');
SELECT ok(has_schema_privilege('rm_tap_bob', 'risky_migrations', 'USAGE'), 'it may look into the schema of the state');
SELECT ok(NOT has_schema_privilege('rm_tap_bob', 'risky_migrations', 'CREATE'), 'but make nothing there');
SELECT cmp_ok((SELECT count(*) FROM member WHERE type = 'table'), '>=', 9::bigint, 'there are tables that this was asked of');

-----------------------------------------------------------------------
-- What alice does, bob does not see
-----------------------------------------------------------------------

SET ROLE rm_tap_alice;
CREATE TABLE alice.secret (id int PRIMARY KEY, v text NOT NULL);
INSERT INTO alice.secret VALUES (1, '1'), (2, 'top secret');
CALL rm_add_column('alice.secret', 'v', 'int', 'v::int');
SET client_min_messages = error;
CALL rm_backfill_batched();
SET client_min_messages = warning;
SET search_path = alice, public;
CALL rm_migrate('0001');
SELECT rm_seed(5) AS seeded \gset
CALL rm_migrate('0003');
SELECT rm_probe_start('SELECT ''top secret''', '50 ms') AS probe \gset
RESET search_path;
RESET ROLE;
SELECT id AS migration FROM rm_migrations WHERE relation = 'alice.secret' \gset
INSERT INTO risky_migrations.comparison (run_id, approach, owner, rows, started_at, finished_at, first_step, last_step,
	read_probe, write_probe, heap_bytes_before, heap_bytes_after, index_bytes_before, index_bytes_after, rows_checked, rows_wrong)
SELECT 1, 'three_step', 'rm_tap_alice'::regrole, 5, now() - interval '1 min', now(), 1, 1000, :probe, :probe, 1, 1, 1, 1, 5, 0;
DO $$ BEGIN
	FOR i IN 1..6000 LOOP
		EXIT WHEN EXISTS (SELECT FROM rm_probe_results);
		PERFORM pg_sleep(0.01);
	END LOOP;
END $$;

-- what one role sees, as counts
CREATE FUNCTION seen(OUT what text, OUT n bigint) RETURNS SETOF record LANGUAGE sql AS $$
	SELECT 'migrations', count(*) FROM rm_migrations
	UNION ALL SELECT 'conversion errors', count(*) FROM rm_conversion_errors
	UNION ALL SELECT 'locks', least(count(*), 1) FROM rm_lock_report()
	UNION ALL SELECT 'lock report view', least(count(*), 1) FROM risky_migrations.lock_report
	UNION ALL SELECT 'lab steps', least(count(*), 1) FROM risky_migrations.lab_step
	UNION ALL SELECT 'probes', count(*) FROM rm_probes
	UNION ALL SELECT 'probe results', least(count(*), 1) FROM rm_probe_results
	UNION ALL SELECT 'comparison', count(*) FROM rm_comparison()
	UNION ALL SELECT 'comparison steps', least(count(*), 1) FROM risky_migrations.comparison_step
	UNION ALL SELECT 'comparison latest', count(*) FROM risky_migrations.comparison_latest
	UNION ALL SELECT 'timeline', least(count(*), 1) FROM rm_timeline()
$$;
SELECT results_eq('SELECT n FROM seen()', ARRAY[2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]::bigint[], 'a superuser sees everything');
SET ROLE rm_tap_alice;
SELECT results_eq('SELECT n FROM seen()', ARRAY[2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]::bigint[], 'alice sees what is hers');
SET ROLE rm_tap_carol;
SELECT results_eq('SELECT n FROM seen()', ARRAY[2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]::bigint[], 'carol, who may act as alice, too');
SET ROLE rm_tap_bob;
SELECT results_eq('SELECT n FROM seen()', ARRAY[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]::bigint[], 'bob sees nothing of it');
-- a function in the WHERE clause gets no look at what the view holds back
CREATE FUNCTION bob.peek(anyelement) RETURNS boolean LANGUAGE plpgsql COST 0.0000001 AS $$
BEGIN RAISE EXCEPTION 'saw %', $1; END $$;
SELECT lives_ok('SELECT * FROM rm_conversion_errors WHERE bob.peek(value)', 'nor through a leaky function');
SELECT lives_ok('SELECT * FROM rm_migrations WHERE bob.peek(using_expr)', 'of migrations');
SELECT lives_ok('SELECT * FROM rm_probe_results r WHERE bob.peek(r.latency_ms)', 'of probes');
SELECT lives_ok('SELECT * FROM risky_migrations.lock_report WHERE bob.peek(relation)', 'of locks');
SELECT lives_ok('SELECT * FROM risky_migrations.lab_step WHERE bob.peek(step)', 'of the lab');
SELECT lives_ok('SELECT * FROM risky_migrations.comparison_latest WHERE bob.peek(approach)', 'of comparisons');

-----------------------------------------------------------------------
-- What is alice's, bob may not touch
-----------------------------------------------------------------------

SELECT throws_ok('SELECT * FROM risky_migrations.migration', '42501', NULL, 'bob reads no state');
SELECT throws_ok('SELECT * FROM risky_migrations.conversion_error', '42501', NULL, 'no recorded values');
SELECT throws_ok('UPDATE risky_migrations.migration SET state = ''done''', '42501', NULL, 'writes no state');
SELECT throws_ok('DELETE FROM risky_migrations.step_log', '42501', NULL, 'removes no log');
SELECT throws_ok('INSERT INTO risky_migrations.lab VALUES (1, 2, 3, 4)', '42501', NULL, 'forges no lab');
SELECT throws_ok('UPDATE rm_migrations SET state = ''done''', NULL, NULL, 'not through the views either');
SELECT throws_ok(format('SELECT rm_probe_stop(%s)', :probe), '42501', NULL, 'stops no probe of hers');
SELECT throws_ok('SET search_path = alice; SELECT public.rm_seed(1)', NULL, NULL, 'seeds no lab of hers');
RESET search_path;
-- the sync trigger on a table of bob's with the number of alice's migration: her expression is
-- not evaluated, nothing is recorded in her name
CREATE TABLE bob.bait (id int, v text, v_new int);
SELECT format('CREATE TRIGGER bait BEFORE INSERT ON bob.bait FOR EACH ROW EXECUTE FUNCTION risky_migrations.sync(%L)', :migration) \gexec
INSERT INTO bob.bait VALUES (1, 'not a number', 5);
SELECT results_eq('SELECT v_new FROM bob.bait', ARRAY[5], 'the trigger on another table leaves the row alone');
RESET ROLE;
SELECT is((SELECT count(*) FROM risky_migrations.conversion_error WHERE value = 'not a number'), 0::bigint, 'and records nothing');

-- a writer with rights on the table only makes the trigger work
GRANT USAGE ON SCHEMA alice TO rm_tap_bob;
GRANT SELECT, INSERT, UPDATE ON alice.secret TO rm_tap_bob;
SET ROLE rm_tap_bob;
SELECT lives_ok('INSERT INTO alice.secret VALUES (3, ''3''), (4, ''bad'')', 'bob may write where he may write');
SELECT results_eq('SELECT v_new FROM alice.secret WHERE id >= 3 ORDER BY id', ARRAY[3, NULL]::int[], 'and it is converted');
SELECT is((SELECT count(*) FROM rm_conversion_errors), 0::bigint, 'he does not see the failure that he caused');
RESET ROLE;
SELECT is((SELECT count(*) FROM rm_conversion_errors WHERE value = 'bad'), 1::bigint, 'but it was recorded');
SELECT rm_probe_stop(:probe) AS samples \gset

-----------------------------------------------------------------------
-- Schemas in the way
-----------------------------------------------------------------------

-- evil: functions and operators that the extension's queries use, which write
-- down as whom they were called
CREATE SCHEMA evil AUTHORIZATION rm_tap_bob;
CREATE TABLE evil.caught (who name, what text);
GRANT INSERT, SELECT ON evil.caught TO PUBLIC;
GRANT USAGE ON SCHEMA evil TO PUBLIC;
SET ROLE rm_tap_bob;
CREATE FUNCTION evil.catch(text) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN INSERT INTO evil.caught VALUES (current_user, $1); RETURN true; END $$;
CREATE FUNCTION evil.eq(bigint, bigint) RETURNS boolean LANGUAGE sql AS $$ SELECT evil.catch('int8 =') $$;
CREATE FUNCTION evil.eq(text, text) RETURNS boolean LANGUAGE sql AS $$ SELECT evil.catch('text =') $$;
CREATE FUNCTION evil.eq(oid, oid) RETURNS boolean LANGUAGE sql AS $$ SELECT evil.catch('oid =') $$;
CREATE FUNCTION evil.eq(varchar, text) RETURNS boolean LANGUAGE sql AS $$ SELECT evil.catch('varchar =') $$;
CREATE FUNCTION evil.cat(text, text) RETURNS text LANGUAGE sql AS $$ SELECT evil.catch('||')::text $$;
CREATE FUNCTION evil.plus(bigint, bigint) RETURNS bigint LANGUAGE sql AS $$ SELECT evil.catch('+')::int::bigint $$;
CREATE OPERATOR evil.= (LEFTARG = bigint, RIGHTARG = bigint, FUNCTION = evil.eq);
CREATE OPERATOR evil.= (LEFTARG = text, RIGHTARG = text, FUNCTION = evil.eq);
CREATE OPERATOR evil.= (LEFTARG = oid, RIGHTARG = oid, FUNCTION = evil.eq);
CREATE OPERATOR evil.= (LEFTARG = varchar, RIGHTARG = text, FUNCTION = evil.eq);
CREATE OPERATOR evil.|| (LEFTARG = text, RIGHTARG = text, FUNCTION = evil.cat);
CREATE OPERATOR evil.+ (LEFTARG = bigint, RIGHTARG = bigint, FUNCTION = evil.plus);
CREATE FUNCTION evil.clock_timestamp() RETURNS timestamptz LANGUAGE sql AS $$ SELECT evil.catch('clock_timestamp'); SELECT pg_catalog.now() $$;
CREATE FUNCTION evil.pg_has_role(oid, text) RETURNS boolean LANGUAGE sql AS $$ SELECT evil.catch('pg_has_role') $$;
CREATE FUNCTION evil.pg_backend_pid() RETURNS int LANGUAGE sql AS $$ SELECT evil.catch('pg_backend_pid')::int $$;
CREATE FUNCTION evil.round(numeric, int) RETURNS numeric LANGUAGE sql AS $$ SELECT evil.catch('round')::int::numeric $$;
CREATE FUNCTION evil.generate_series(bigint, bigint) RETURNS SETOF bigint LANGUAGE sql AS $$ SELECT evil.catch('generate_series')::int::bigint $$;
CREATE FUNCTION evil.to_char(timestamp, text) RETURNS text LANGUAGE sql AS $$ SELECT evil.catch('to_char')::text $$;
CREATE FUNCTION evil.may_see(oid, oid) RETURNS boolean LANGUAGE sql AS $$ SELECT evil.catch('may_see') $$;
CREATE FUNCTION evil.is_lab_form(text) RETURNS boolean LANGUAGE sql AS $$ SELECT evil.catch('is_lab_form') $$;
CREATE FUNCTION evil.lab_moment(bigint) RETURNS text LANGUAGE sql AS $$ SELECT evil.catch('lab_moment')::text $$;
CREATE TABLE evil.migration AS SELECT 1 AS id;
CREATE TABLE evil.pg_class AS SELECT 1 AS oid;
CREATE TABLE evil.pg_locks AS SELECT 1 AS pid;
RESET ROLE;

-- bob does everything with that in the way: his code may run as bob, never as another
CREATE TABLE bob.his (id bigint PRIMARY KEY, v varchar(50) NOT NULL);
INSERT INTO bob.his SELECT i, i::text FROM pg_catalog.generate_series(1, 20) i;
ALTER TABLE bob.his OWNER TO rm_tap_bob;
DROP TRIGGER bait ON bob.bait;
SET ROLE rm_tap_bob;
SET search_path = evil, pg_catalog, bob, public, pg_temp;
-- the attack works on what has no path of its own
DO $$ BEGIN PERFORM 1::bigint = 2::bigint; END $$;
SELECT pg_catalog.set_config('tap.caught', count(*)::text, false) AS caught FROM evil.caught \gset
CALL public.rm_add_column('bob.his', 'v', 'int', 'v::int');
INSERT INTO bob.his VALUES (21, '21');
CALL public.rm_backfill_batched(5);
CALL public.rm_enforce_not_null();
CALL public.rm_rollback();
SELECT count(*) FROM public.rm_migrations \gset
SELECT count(*) FROM public.rm_progress \gset
SELECT count(*) FROM public.rm_conversion_errors \gset
SELECT count(*) FROM public.rm_lock_report() \gset
SELECT count(*) FROM public.rm_blocked_queries() \gset
SELECT count(*) FROM public.rm_active_queries() \gset
SELECT count(*) FROM public.rm_table_sizes() \gset
SELECT count(*) FROM public.rm_comparison() \gset
SELECT count(*) FROM public.rm_timeline() \gset
SELECT count(*) FROM public.rm_showmigrations() \gset
-- the lab, with the schema in the way
CALL public.rm_migrate('0001');
SELECT public.rm_seed(5) \gset
CALL public.rm_migrate('0002');
CALL public.rm_migrate('0005');
SELECT public.rm_list_large() \gset
SELECT rows_wrong FROM public.rm_lab_check() \gset
SELECT risky_migrations.lab_write(5) \gset
CALL public.rm_migrate('zero');
RESET search_path;
RESET ROLE;
SELECT isnt(current_setting('tap.caught'), '0', 'the attack was armed');
SELECT is_empty($$SELECT DISTINCT who, what FROM evil.caught WHERE who <> 'rm_tap_bob'$$, 'no code of bob''s ran as the owner of the extension');
SELECT is(:rows_wrong::bigint, 0::bigint, 'and none of it spoiled the result');

-- the superuser works on tables of bob's with bob's schema first in the path
TRUNCATE evil.caught;
SET search_path = evil, pg_catalog, bob, public, pg_temp;
CALL public.rm_add_column('bob.his', 'v', 'int', 'pg_catalog.int4in(pg_catalog.varcharout(v))');
SELECT max(id) AS id FROM public.rm_migrations \gset
CALL public.rm_backfill_batched(5, :id);
CALL public.rm_enforce_not_null(:id);
CALL public.rm_rollback(:id);
SELECT count(*) FROM public.rm_migrations \gset
SELECT count(*) FROM public.rm_lock_report() \gset
SELECT count(*) FROM public.rm_blocked_queries() \gset
SELECT count(*) FROM public.rm_active_queries() \gset
SELECT count(*) FROM public.rm_table_sizes() \gset
SELECT count(*) FROM public.rm_comparison() \gset
SELECT count(*) FROM public.rm_timeline() \gset
SELECT count(*) FROM public.rm_showmigrations() \gset
RESET search_path;
SELECT is_empty('SELECT DISTINCT what FROM evil.caught', 'nor when the superuser has bob''s schema in the path');

-- temporary objects are not found before the real ones either
SET ROLE rm_tap_bob;
CREATE TEMP TABLE migration (id bigint, state text);
CREATE TEMP TABLE step_log (id bigint);
CREATE TEMP TABLE pg_class (oid oid);
SELECT lives_ok('SELECT * FROM rm_migrations', 'views mean what they meant');
CALL rm_add_column('bob.his', 'v', 'int', 'v::int');
CALL rm_rollback();
SELECT is((SELECT count(*) FROM pg_temp.migration), 0::bigint, 'nothing was written into a temporary table');
RESET ROLE;

SELECT * FROM finish();
DROP EXTENSION risky_migrations CASCADE;
SET client_min_messages = error;
DROP OWNED BY rm_tap_alice, rm_tap_bob, rm_tap_carol CASCADE;
DROP ROLE rm_tap_carol, rm_tap_alice, rm_tap_bob;

-- The lab where somebody has been at its tables.
CREATE SCHEMA lab_odd;
SET search_path = lab_odd;
SET client_min_messages = warning;
CREATE EXTENSION risky_migrations SCHEMA public;
SET search_path = lab_odd, public;

-- the way back from 0002 brings back what ALTER TABLE resets
CALL rm_migrate('0001');
ALTER TABLE large_record ALTER created_at TYPE varchar(50) COLLATE "C";
ALTER TABLE large_record ALTER created_at SET STORAGE EXTERNAL, ALTER created_at SET COMPRESSION pglz;
SELECT rm_seed(50);
CREATE FUNCTION column_properties() RETURNS text LANGUAGE sql AS $$
	SELECT format('%s %s %s %s', format_type(atttypid, atttypmod), attstorage, attcompression, attcollation::regcollation)
	FROM pg_attribute WHERE attrelid = 'large_record'::regclass AND attname = 'created_at' $$;
SELECT column_properties();
CALL rm_migrate('0002');
SELECT column_properties();
CALL rm_migrate('0001');
SELECT column_properties();
SELECT * FROM rm_lab_check();

-- 0002 is both tables or none, also where the small one could not be changed back
UPDATE small_record SET created_at = 'Jan 3 2024' WHERE id = 7;
UPDATE large_record SET created_at = 'nope' WHERE id = 7;
CALL rm_migrate('0002');
\echo SQLSTATE :SQLSTATE
SELECT created_at FROM small_record WHERE id = 7;
SELECT number, applied, applied_at IS NULL AS never FROM rm_showmigrations() WHERE number = '0002';

-- an object that PostgreSQL itself does not carry over
SELECT rm_seed(50);
ALTER TABLE large_record ALTER created_at SET DEFAULT '2024-01-01 10:00:00';
CALL rm_migrate('0002');
\echo SQLSTATE :SQLSTATE
ALTER TABLE large_record ALTER created_at DROP DEFAULT;
SELECT * FROM rm_lab_check();

-- a table is lost: nothing is applied any more, zero takes the rest away
CALL rm_migrate('0004');
DROP TABLE large_record;
SELECT number, applied FROM rm_showmigrations();
CALL rm_migrate('0004');
\echo SQLSTATE :SQLSTATE
CALL rm_migrate('zero');
SELECT count(*) FROM pg_class WHERE relname = 'small_record';
SELECT DISTINCT state FROM rm_migrations;
CALL rm_migrate('0001');

-- a renamed table is the user's
ALTER TABLE large_record RENAME TO mine;
CALL rm_migrate('zero');
SELECT relname FROM pg_class WHERE relname IN ('mine', 'small_record');
DROP TABLE mine;

-- not where nobody could wait, and not where nothing may be written
SET search_path = pg_temp, public;
CALL rm_migrate('0001');
\echo SQLSTATE :SQLSTATE
SET search_path = lab_odd, public;
SET default_transaction_read_only = on;
CALL rm_migrate('0001');
\echo SQLSTATE :SQLSTATE
RESET default_transaction_read_only;

-- what another role sees of it: that it is there; and all, once it may read
CALL rm_migrate('0004');
CREATE ROLE regress_rm_stranger;
GRANT USAGE ON SCHEMA lab_odd TO regress_rm_stranger;
SET ROLE regress_rm_stranger;
SELECT applied, number, applied_at IS NOT NULL AS applied_at, duration IS NOT NULL AS duration FROM rm_showmigrations();
RESET ROLE;
GRANT SELECT ON large_record TO regress_rm_stranger;
SET ROLE regress_rm_stranger;
SELECT applied, number, applied_at IS NOT NULL AS applied_at, duration IS NOT NULL AS duration FROM rm_showmigrations();
RESET ROLE;
CALL rm_migrate('0002');
SET ROLE regress_rm_stranger;
SELECT applied, number FROM rm_showmigrations();
RESET ROLE;
-- where there is none, there is none for everybody
CALL rm_migrate('zero');
SET ROLE regress_rm_stranger;
SELECT applied, number FROM rm_showmigrations();
RESET ROLE;

DROP EXTENSION risky_migrations;
DROP SCHEMA lab_odd CASCADE;
DROP ROLE regress_rm_stranger;

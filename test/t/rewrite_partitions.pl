# online_rewrite of a partitioned table: each partition has a shadow and a log, and
# all are exchanged at once.
#
# As in rewrite.pl every row says in "want" what its new value must be.  Clients
# write, also move rows from one partition to another, while partitions are made,
# attached with rows in them, detached and dropped; a partition is rewritten, its
# trigger switched off; the server is killed.

use strict;
use warnings;

use LabServer;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(usleep);

my $node = start_server('rewrite_partitions', q{
autovacuum = on
max_worker_processes = 20
restart_after_crash = on
risky_migrations.lock_retries = 1000
risky_migrations.lock_retry_max_delay = 50
});
my $dir = PostgreSQL::Test::Utils::tempdir;
sql('CREATE EXTENSION amcheck');

# partitions of two levels, one with its columns in another order and an index of its own
sub make_table
{
	my ($name) = @_;
	sql(qq{
		DROP TABLE IF EXISTS $name CASCADE;
		CREATE TABLE $name (gone int, id int NOT NULL, day int NOT NULL, v varchar(40) NOT NULL, want bigint NOT NULL,
			PRIMARY KEY (day, id), CHECK (want >= 0)) PARTITION BY RANGE (day);
		ALTER TABLE $name DROP gone;
		CREATE INDEX ${name}_v ON $name (v, want);
		CREATE INDEX ON $name ((length(v::text)), id);
		CREATE TABLE ${name}0 PARTITION OF $name FOR VALUES FROM (0) TO (10);
		CREATE TABLE ${name}1 (want bigint NOT NULL CHECK (want >= 0), day int NOT NULL, gone text, v varchar(40) NOT NULL, id int NOT NULL);
		ALTER TABLE ${name}1 DROP gone, ADD CONSTRAINT ${name}_want_check CHECK (want >= 0);
		CREATE INDEX "${name} only" ON ${name}1 (v DESC) WHERE id > 10;
		ALTER TABLE $name ATTACH PARTITION ${name}1 FOR VALUES FROM (10) TO (20);
		CREATE TABLE ${name}2 PARTITION OF $name FOR VALUES FROM (20) TO (40) PARTITION BY LIST (day);
		CREATE TABLE ${name}2a PARTITION OF ${name}2 FOR VALUES IN (20, 21, 22) WITH (fillfactor = 80);
		CREATE TABLE ${name}2b PARTITION OF ${name}2 DEFAULT;
		CREATE VIEW ${name}_view AS SELECT id, v FROM $name WHERE v IS NOT NULL;
		CREATE VIEW ${name}_leaf_view AS SELECT v FROM ${name}2a;
		COMMENT ON COLUMN $name.v IS 'what';
		INSERT INTO $name (id, day, v, want) SELECT g, g % 30, g * 3, g * 3 FROM generate_series(1, 20000) g;
	});
	return;
}

my $members = q{(SELECT x FROM risky_migrations.members('NAME'::regclass) x)};

sub check_rows
{
	my ($name, $what) = @_;
	my $in = $members =~ s/NAME/$name/r;
	is(sql("SELECT count(*) FROM $name WHERE v::bigint <> want OR v IS NULL"), '0', "$what: every row has its value");
	is(sql("SELECT string_agg(DISTINCT format_type(atttypid, atttypmod), ', ') FROM pg_attribute WHERE attrelid IN $in AND attname = 'v'"),
		'bigint', "$what: in each partition in the new type");
	is(sql(qq{SELECT string_agg(i.indexrelid::regclass::text, ', ') FROM pg_index i WHERE i.indrelid IN $in
			AND (NOT i.indisvalid OR i.indexrelid::regclass::text !~ 'only' AND i.indrelid <> '$name'::regclass
				AND NOT EXISTS (SELECT FROM pg_inherits h WHERE h.inhrelid = i.indexrelid))}),
		'', "$what: all indexes are valid and attached");
	is(sql(qq{SELECT count(*) > 0, count(*) = count(bt_index_check(i.indexrelid, true)::text) FROM pg_index i
			JOIN pg_class c ON c.oid = i.indexrelid AND c.relkind = 'i' WHERE i.indrelid IN $in}),
		't|t', "$what: every row is in every index");
	is(sql("SELECT count(*) FROM pg_class c, verify_heapam(c.oid) WHERE c.oid IN $in AND c.relkind = 'r'"), '0', "$what: the pages are sound");
	is(sql(q{SELECT string_agg(relname, ', ') FROM pg_class WHERE relname ~ '^(shadow|log)_\d'
		UNION ALL SELECT string_agg(tgname, ', ') FROM pg_trigger WHERE tgname ~ '^~rm_'
		UNION ALL SELECT string_agg(relid::text, ', ') FROM risky_migrations.rewrite}), "\n\n", "$what: nothing is left");
	return;
}

sub definitions_of
{
	my ($name) = @_;
	return dump_of('-t', "$name*") =~ s/\b$name(?=\d|\b|_|")/it/gr;
}

append_to_file("$dir/write.sql", q{
\set id random(1, 30000)
\set day random(0, 29)
\set x random(1, 1000000000)
UPDATE busy SET v = ':x', want = :x WHERE id = :id AND day = :id % 30;
UPDATE busy SET day = :day WHERE id = :id AND day = (:id + 1) % 30 AND NOT EXISTS (SELECT FROM busy b WHERE b.id = :id AND b.day = :day);
INSERT INTO busy (id, day, v, want) VALUES (:id, (:id + 1) % 30, ':x', :x) ON CONFLICT (day, id) DO UPDATE SET v = excluded.v, want = excluded.want;
BEGIN;
SAVEPOINT s;
DELETE FROM busy WHERE id = :id;
ROLLBACK TO s;
DELETE FROM busy WHERE id = :id + 7 AND id % 3 = 0;
COMMIT;
});

# ---------------------------------------------------------------------------
# Beside writers, and partitions that come and go
# ---------------------------------------------------------------------------

make_table('busy');
make_table('twin');
my $pgbench = start_pgbench($dir, '-R', '300', '-c', '3', '-f', "$dir/write.sql");
my $call = start_call('migration', q{CALL rm_alter_type('busy', 'v', 'bigint', 'v::bigint', method => 'online_rewrite')});
for my $i (0 .. 3)
{
	usleep(200_000);
	my ($from, $to) = (40 + 10 * $i, 50 + 10 * $i);
	# of either type, as it is at the moment
	sql("CREATE TABLE busy_new PARTITION OF busy FOR VALUES FROM ($from) TO ($to);
		INSERT INTO busy (id, day, v, want) SELECT g, $from, '5', 5 FROM generate_series(1, 100) g");
	usleep(100_000);
	sql($i % 2 ? 'DROP TABLE busy_new' : 'ALTER TABLE busy DETACH PARTITION busy_new; DROP TABLE busy_new');
}
ends_well($call, 'beside writers, with partitions that come and go, it ends');
ok(end_pgbench($pgbench), 'no writer failed') or diag slurp_file("$dir/err");
check_rows('busy', 'beside writers');
sql('DROP VIEW twin_view, twin_leaf_view; ALTER TABLE twin ALTER v TYPE bigint USING v::bigint;
	CREATE VIEW twin_view AS SELECT id, v FROM twin WHERE v IS NOT NULL; CREATE VIEW twin_leaf_view AS SELECT v FROM twin2a');
is(definitions_of('busy'), definitions_of('twin'), 'the catalogs say what they do after ALTER TABLE');
is(sql("SELECT string_agg(DISTINCT tablename, ',' ORDER BY tablename) FROM pg_stats WHERE attname = 'v' AND tablename ~ '^busy'"),
	'busy,busy0,busy1,busy2,busy2a,busy2b', 'there are statistics of the column in each');

# ---------------------------------------------------------------------------
# Up to the cut-over, and what happens then
# ---------------------------------------------------------------------------

my $id;

sub up_to_cut_over
{
	sql('DROP TABLE busy CASCADE');
	make_table('busy');
	sql(q{CALL rm_alter_type('busy', 'v', 'bigint', 'v::bigint', method => 'online_rewrite', cut_over => 'manual')});
	$id = sql('SELECT max(id) FROM risky_migrations.migration');
	return;
}

# what is shadowed, and how often that was begun: the shadow's OIDs
sub shadows { return sql('SELECT string_agg(relid::regclass || $$=$$ || shadow, $$ $$ ORDER BY relid::regclass::text) FROM risky_migrations.rewrite') }

sub cuts_over
{
	my ($what) = @_;
	sql('UPDATE busy SET want = want + 1, v = want + 1 WHERE id % 100 = 0; DELETE FROM busy WHERE id % 100 = 1');
	sql("CALL rm_cut_over($id)");
	check_rows('busy', $what);
	return;
}

up_to_cut_over();
like(shadows(), qr/^busy0=\d+ busy1=\d+ busy2a=\d+ busy2b=\d+$/, 'each partition with rows has a shadow');
sql(q{CREATE TABLE busy3 (id int NOT NULL, day int NOT NULL, v varchar(40) NOT NULL, want bigint NOT NULL, CONSTRAINT busy_want_check CHECK (want >= 0));
	INSERT INTO busy3 SELECT g, 45, g, g FROM generate_series(1, 1000) g;
	ALTER TABLE busy ATTACH PARTITION busy3 FOR VALUES FROM (40) TO (50)});
sql('ALTER TABLE busy DETACH PARTITION busy1');
my $before = shadows();
cuts_over('attached with rows, and detached');
is(sql(q{SELECT count(*), pg_typeof((SELECT v FROM busy1 LIMIT 1)) FROM busy1}), '6670|character varying', 'what was detached is as it was');
is(sql(q{SELECT count(*) FROM pg_trigger WHERE tgrelid = 'busy1'::regclass}), 0, 'without a trigger');
sql('DROP TABLE busy1');

# only what is at fault begins again
for (
	[ 'a partition is rewritten', 'VACUUM FULL busy1', 'busy1' ],
	[ 'a partition is emptied', 'TRUNCATE busy2a', 'busy2a' ],
	[ 'a partition is taken out and put back', q{ALTER TABLE busy DETACH PARTITION busy0; UPDATE busy0 SET v = '6', want = 6 WHERE id % 7 = 0;
		ALTER TABLE busy ATTACH PARTITION busy0 FOR VALUES FROM (0) TO (10)}, 'busy0' ],
	[ 'the trigger of a partition is switched off', q{DO $$ BEGIN EXECUTE (SELECT format('ALTER TABLE busy0 DISABLE TRIGGER %I', tgname)
		FROM pg_trigger WHERE tgrelid = 'busy0'::regclass AND tgname ~ '^~rm_'); END $$; UPDATE busy0 SET v = '8', want = 8 WHERE id % 7 = 0}, 'busy0' ])
{
	my ($what, $do, $whose) = @$_;
	up_to_cut_over();
	my %old = map { split /=/ } split / /, shadows();
	sql($do);
	my ($status, $out, $err) = $node->psql('postgres', "SET client_min_messages = notice; CALL rm_cut_over($id)");
	like($err, qr/begins again with partition public\.$whose/, "$what: that partition begins again");
	unlike($err, qr/begins again with partition public\.(?!$whose)/, 'and no other');
	check_rows('busy', $what);
}

# the trigger of all
up_to_cut_over();
sql(q{DO $$ BEGIN EXECUTE (SELECT format('DROP TRIGGER %I ON busy', tgname) FROM pg_trigger WHERE tgrelid = 'busy'::regclass AND tgname ~ '^~rm_'); END $$;
	UPDATE busy SET v = '9', want = 9 WHERE id % 5 = 0});
cuts_over('the trigger is dropped');

# an index that is made on all, or on one
up_to_cut_over();
sql('CREATE INDEX busy_more ON busy (v, day DESC); CREATE INDEX busy_one ON busy0 (v) WHERE id > 5; DROP INDEX "busy only"');
sql("CALL rm_cut_over($id)");
is(sql("SELECT count(*) FROM pg_indexes WHERE tablename ~ '^busy' AND indexname ~ 'busy_one|busy_more|v_day_idx'"), 7, 'indexes that were made meanwhile are there');
check_rows('busy', 'with other indexes') if sql('DROP INDEX busy_one') eq '';

# what stands in the way of ALTER TABLE, as long as it does
my ($status, $out, $err);
sub refused
{
	my ($do, $like, $undo, $what) = @_;
	sql($do);
	($status, $out, $err) = $node->psql('postgres', "CALL rm_cut_over($id)");
	like($err, $like, $what);
	sql($undo);
	return;
}

up_to_cut_over();
sql('CREATE PUBLICATION listed FOR TABLE busy2a (day, id, v)');
refused('CREATE INDEX busy_half ON ONLY busy (v)', qr/index public\.busy_half: not all partitions have their part/, 'DROP INDEX busy_half',
	'an index that only the partitioned table has');
refused('ALTER INDEX busy0_v_want_idx RENAME TO busy0_other; CREATE INDEX busy0_v_want_idx ON busy0 (v) WHERE id > 7',
	qr/relation "busy0_v_want_idx" already exists.*HINT:  Rename that index, then/s, 'ALTER INDEX busy0_v_want_idx RENAME TO "busy0 only"',
	'an index whose name ALTER TABLE gives to another');
refused(q{CREATE ROLE somebody; CREATE TABLE busy4 PARTITION OF busy FOR VALUES FROM (50) TO (60); ALTER TABLE busy4 OWNER TO somebody},
	qr/cannot change table "busy4".*has another owner/s, 'ALTER TABLE busy4 OWNER TO CURRENT_USER', 'a partition of another owner that has come since');
sql("SELECT rm_resume($id)");
wait_for("(SELECT state FROM risky_migrations.migration WHERE id = $id) = 'done'", 'it does not end');
check_rows('busy', 'when nothing is in the way any more');
is(sql(q{SELECT string_agg(tablename || attnames::text, ' ' ORDER BY tablename) FROM pg_publication_tables WHERE pubname = 'listed'}),
	'busy2a{id,day,v}', 'a publication that lists the column does so still');
sql('DROP PUBLICATION listed');

# a row that moves between the rounds of two partitions, seen by a snapshot of just before the exchange
sub end_session { my ($name) = @_; return sql("SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = '$name'") }
sub session_in { my ($name, $event) = @_; wait_for("EXISTS (SELECT FROM pg_stat_activity WHERE application_name = '$name' AND wait_event = '$event')", "$name is not in $event"); return }

sql(q{CREATE FUNCTION slowly(v varchar) RETURNS bigint LANGUAGE plpgsql IMMUTABLE AS $$ BEGIN
	WHILE v = '777' AND NOT pg_try_advisory_xact_lock_shared(10) LOOP PERFORM pg_sleep(0.05); END LOOP;
	RETURN v::bigint; END $$});
sql('DROP TABLE busy CASCADE');
make_table('busy');
sql(q{CALL rm_alter_type('busy', 'v', 'bigint', 'slowly(v)', method => 'online_rewrite', cut_over => 'manual')});
$id = sql('SELECT max(id) FROM risky_migrations.migration');
my $old = start_call('old', 'BEGIN ISOLATION LEVEL REPEATABLE READ', 'SELECT pg_sleep(60)');
session_in('old', 'PgSleep');
my $cut = start_call('cut', "CALL rm_cut_over($id)");
wait_for("EXISTS (SELECT FROM rm_progress WHERE migration = $id AND waiting_for IS NOT NULL)", 'nobody is waited for');
sql(q{UPDATE busy SET v = '777', want = 777 WHERE id = 30 AND day = 0});
my $gate = close_gate(10);
end_session('old');
session_in('cut', 'PgSleep');
sql('UPDATE busy SET day = 15 WHERE id = 60 AND day = 0');
my $holder = start_call('holder', 'BEGIN', 'LOCK TABLE busy1 IN ACCESS SHARE MODE', 'SELECT pg_advisory_lock(8)', 'SELECT pg_sleep(60)');
session_in('holder', 'PgSleep');
$gate->quit;
wait_for("(SELECT phase FROM risky_migrations.migration WHERE id = $id) = 2", 'the last round does not end');
my $keeper = start_call('keeper', 'SELECT pg_advisory_lock(9)', 'SELECT pg_sleep(60)');
session_in('keeper', 'PgSleep');
my $reader = start_call('reader', 'BEGIN ISOLATION LEVEL REPEATABLE READ', 'SELECT 1', 'SELECT pg_advisory_lock(9)', 'SELECT count(*) FROM busy WHERE id = 60');
session_in('reader', 'advisory');
end_session('holder');
ends_well($cut, 'it is exchanged');
end_session('keeper');
finish_call($reader);
is($reader->{out}, "1\n\n1\n", 'a row that has moved is seen once');
finish_call($_) for $old, $holder, $keeper;
check_rows('busy', 'after a row has moved');

# a partition that is dropped while somebody is at work on its shadow (and has no snapshot)
sql('DROP TABLE busy CASCADE');
make_table('busy');
up_to_cut_over();
my $shadow = sql(q{SELECT shadow::regclass FROM risky_migrations.rewrite WHERE relid = 'busy1'::regclass});
my $worker = $node->background_psql('postgres');
$worker->query_safe("BEGIN; LOCK TABLE $shadow IN ACCESS SHARE MODE");
sql('DROP TABLE busy1');
$cut = start_call('cut', "CALL rm_cut_over($id)");
wait_for(q{(SELECT atttypid = 'bigint'::regtype FROM pg_attribute WHERE attrelid = 'busy'::regclass AND attname = 'v')},
	'the shadow of a dropped partition keeps the others from being exchanged');
isnt(sql("SELECT to_regclass('$shadow')"), '', 'the exchange does not wait for the shadow of a dropped partition');
$worker->quit;
ends_well($cut, 'it ends when that can be dropped');
is(sql("SELECT to_regclass('$shadow')"), '', 'and has dropped it');
sql('DROP TABLE busy CASCADE');
make_table('busy');

# without the table
up_to_cut_over();
sql("ALTER TABLE busy DETACH PARTITION busy1; DROP TABLE busy CASCADE; CALL rm_rollback($id)");
is(sql(q{SELECT (SELECT count(*) FROM pg_class WHERE relname ~ '^(shadow|log)_\d'), (SELECT count(*) FROM risky_migrations.rewrite)}), '0|0',
	'a migration whose table is gone leaves nothing in what was detached');
sql('DROP TABLE busy1');
make_table('busy');

# the way back
up_to_cut_over();
sql("CALL rm_rollback($id)");
is(sql(q{SELECT pg_typeof((SELECT v FROM busy LIMIT 1)), (SELECT count(*) FROM pg_class WHERE relname ~ '^(shadow|log)_\d'),
	(SELECT count(*) FROM pg_trigger WHERE tgname ~ '^~rm_'), (SELECT count(*) FROM risky_migrations.rewrite)}), 'character varying|0|0|0',
	'a migration that is given up leaves nothing');

# ---------------------------------------------------------------------------
# Killed at any time
# ---------------------------------------------------------------------------

for my $after (100, 250, 500)
{
	sql('DROP TABLE busy CASCADE');
	make_table('busy');
	$id = sql(q{SELECT rm_start('busy', 'v', 'bigint', 'v::bigint', method => 'online_rewrite')});
	usleep($after * 1000);
	my $pid = sql("SELECT pid FROM pg_stat_activity WHERE application_name ~ 'risky_migrations migration $id'");
	kill 'KILL', $pid if $pid;
	comes_back_after($pid) if $pid;
	sql('UPDATE busy SET v = (want + 1)::text::varchar, want = want + 1 WHERE id % 3 = 0')
	  if sql("SELECT pg_typeof(v) FROM busy LIMIT 1") ne 'bigint';
	sql("SELECT rm_resume($id)") if sql("SELECT state FROM risky_migrations.migration WHERE id = $id") eq 'open';
	wait_for("(SELECT state FROM risky_migrations.migration WHERE id = $id) = 'done'", 'it does not end');
	check_rows('busy', "killed after $after ms");
}

# ---------------------------------------------------------------------------
# The key, and foreign keys
# ---------------------------------------------------------------------------

sql(q{
	CREATE TABLE k (id int, day int, note text, PRIMARY KEY (day, id)) PARTITION BY LIST (day);
	CREATE TABLE k1 PARTITION OF k FOR VALUES IN (1);
	CREATE TABLE k2 PARTITION OF k FOR VALUES IN (2);
	INSERT INTO k SELECT g, 1 + g % 2, 'n' FROM generate_series(1, 5000) g;
	CREATE TABLE of_k (day int, id bigint, FOREIGN KEY (day, id) REFERENCES k (day, id));
	INSERT INTO of_k SELECT 1 + g % 2, g FROM generate_series(1, 500) g;
});
sql(q{CALL rm_alter_type('k', 'id', 'bigint', method => 'online_rewrite')});
is(sql(q{SELECT string_agg(DISTINCT format_type(atttypid, NULL), ', ') FROM pg_attribute WHERE attrelid IN ('k'::regclass, 'k1'::regclass, 'k2'::regclass) AND attname = 'id'}),
	'bigint', 'a key that others refer to is changed');
is(sql(q{SELECT bool_and(convalidated), count(*) FROM pg_constraint WHERE conrelid = 'of_k'::regclass AND contype = 'f'}), 't|3', 'the foreign key is proven, with its parts for each partition');
($status, $out, $err) = $node->psql('postgres', 'INSERT INTO of_k VALUES (1, 100000)');
like($err, qr/violates foreign key constraint/, 'and at work');

($status, $out, $err) = $node->psql('postgres', q{
	CREATE FOREIGN DATA WRAPPER nobody; CREATE SERVER nowhere FOREIGN DATA WRAPPER nobody;
	CREATE TABLE parts (id int, v text) PARTITION BY LIST (id);
	CREATE FOREIGN TABLE far PARTITION OF parts DEFAULT SERVER nowhere;
	CALL rm_alter_type('parts', 'v', 'bigint', 'v::bigint', method => 'online_rewrite')});
like($err, qr/cannot change table "far".*no ordinary table/s, 'a partition that is elsewhere is refused');

sql(q{CREATE TABLE other (id bigint PRIMARY KEY); INSERT INTO other SELECT g FROM generate_series(1, 5000) g;
	ALTER TABLE k ADD FOREIGN KEY (id) REFERENCES other});
($status, $out, $err) = $node->psql('postgres', q{CALL rm_alter_type('k', 'id', 'numeric', method => 'online_rewrite')});
like($err, qr/foreign key.*it is one of a partitioned table/s, 'a foreign key of the partitioned table itself is refused');

# a new partition of a table that has lost one of the columns
sql(q{CREATE TABLE lost (id int PRIMARY KEY, v int, w int) PARTITION BY RANGE (id);
	CREATE TABLE lost1 PARTITION OF lost FOR VALUES FROM (0) TO (1000);
	INSERT INTO lost SELECT g, g, g FROM generate_series(1, 100) g;
	CALL rm_alter_types('lost', '{"v": "bigint", "w": "bigint"}', method => 'online_rewrite', cut_over => 'manual');
	ALTER TABLE lost DROP COLUMN w;
	CREATE TABLE lost2 PARTITION OF lost FOR VALUES FROM (1000) TO (2000)});
($status, $out, $err) = $node->psql('postgres', 'CALL rm_cut_over()');
like($err, qr/has been changed while migration \d+ was open.*The column "w" has been dropped/s, 'a new partition without the column is not begun');
sql('CALL rm_rollback()');

$node->stop;
done_testing();

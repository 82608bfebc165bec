# online_rewrite of a table with children: each has a shadow, a log and a trigger of
# its own, and all are exchanged at once.
#
# As in rewrite.pl every row says in "want" what its new value must be.  Clients
# write, while children are made, attached with rows in them, taken away and dropped;
# one is rewritten, its trigger switched off; the server is killed.

use strict;
use warnings;

use LabServer;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(usleep);

my $node = start_server('rewrite_inheritance', q{
max_worker_processes = 20
restart_after_crash = on
risky_migrations.lock_retries = 1000
risky_migrations.lock_retry_max_delay = 50
});
my $dir = PostgreSQL::Test::Utils::tempdir;
sql('CREATE EXTENSION amcheck');

# from 18 on VACUUM and ANALYZE go down to children
my $only = $node->pg_version >= 18 ? 'ONLY ' : '';

# Children of two levels, one with its columns in another order, indexes and columns of
# its own; but not such as ALTER TABLE of PostgreSQL 18 itself fails for: with a NOT NULL of
# another name on the column than the parent's, also by a primary key.
sub make_table
{
	my ($name) = @_;
	sql(qq{
		DROP TABLE IF EXISTS $name CASCADE;
		CREATE TABLE $name (gone int, id int NOT NULL, v varchar(40) NOT NULL, want bigint NOT NULL, PRIMARY KEY (id), CONSTRAINT fine CHECK (v <> ''));
		ALTER TABLE $name DROP gone;
		CREATE INDEX ${name}_v ON $name (v, want);
		CREATE TABLE ${name}1 (PRIMARY KEY (id), UNIQUE (v, id)) INHERITS ($name);
		CREATE TABLE ${name}2 (want bigint NOT NULL, extra text DEFAULT 'e', gone text, v varchar(40) CONSTRAINT ${name}_v_not_null NOT NULL, CONSTRAINT fine CHECK (v <> ''), UNIQUE (id)) INHERITS ($name);
		ALTER TABLE ${name}2 DROP gone;
		CREATE INDEX "${name}2 only" ON ${name}2 ((length(v::text)), id) WHERE id > 10;
		CREATE TABLE ${name}3 (third int, PRIMARY KEY (id)) INHERITS (${name}1);
		CREATE STATISTICS ${name}_st ON v, want FROM ${name}2;
		CREATE VIEW ${name}_view AS SELECT id, v FROM $name WHERE v IS NOT NULL;
		CREATE VIEW ${name}_leaf_view AS SELECT v FROM ${name}3;
		COMMENT ON COLUMN ${name}3.v IS 'what';
		INSERT INTO $name SELECT g, g * 3, g * 3 FROM generate_series(1, 5000) g;
		INSERT INTO ${name}1 SELECT g, g * 3, g * 3 FROM generate_series(5001, 10000) g;
		INSERT INTO ${name}2 (id, v, want) SELECT g, g * 3, g * 3 FROM generate_series(10001, 15000) g;
		INSERT INTO ${name}3 SELECT g, g * 3, g * 3 FROM generate_series(15001, 20000) g;
	});
	return;
}

sub check_rows
{
	my ($name, $what) = @_;
	my $in = "(SELECT x FROM risky_migrations.members('$name'::regclass) x)";
	is(sql("SELECT count(*) FROM $name WHERE v::bigint <> want OR v IS NULL"), '0', "$what: every row has its value");
	is(sql("SELECT string_agg(DISTINCT format_type(atttypid, atttypmod) || attnotnull, ', ') FROM pg_attribute WHERE attrelid IN $in AND attname = 'v'"),
		'biginttrue', "$what: in each table in the new type");
	is(sql(qq{SELECT count(*) > 0, count(*) = count(bt_index_check(i.indexrelid, true)::text), bool_and(i.indisvalid) FROM pg_index i WHERE i.indrelid IN $in}),
		't|t|t', "$what: every row is in every index");
	is(sql("SELECT count(*) FROM pg_class c, verify_heapam(c.oid) WHERE c.oid IN $in"), '0', "$what: the pages are sound");
	nothing_is_left($what);
	return;
}

sub nothing_is_left
{
	my ($what) = @_;
	is(sql(q{SELECT string_agg(relname, ', ') FROM pg_class WHERE relname ~ '^(shadow|log)_\d'
		UNION ALL SELECT string_agg(tgname || ' ' || tgrelid::regclass, ', ') FROM pg_trigger WHERE tgname ~ '^~rm_'
		UNION ALL SELECT string_agg(format('%s of migration %s', relid::regclass, migration_id), ', ') FROM risky_migrations.rewrite}), "\n\n", "$what: nothing is left");
	return;
}

sub definitions_of
{
	my ($name) = @_;
	return dump_of('-t', "$name*") =~ s/\b$name(?=\d|\b|_|")/it/gr;
}

append_to_file("$dir/write.sql", q{
\set id random(1, 21000)
\set x random(1, 1000000000)
UPDATE busy SET v = ':x', want = :x WHERE id = :id;
INSERT INTO busy3 (id, v, want) VALUES (:id + 20000, ':x', :x) ON CONFLICT (id) DO UPDATE SET v = excluded.v, want = excluded.want;
WITH d AS (DELETE FROM ONLY busy WHERE id = :id + 3 RETURNING *) INSERT INTO busy2 (id, v, want) SELECT id, v, want FROM d;
BEGIN;
SAVEPOINT s;
DELETE FROM busy WHERE id = :id;
ROLLBACK TO s;
DELETE FROM busy WHERE id = :id + 7 AND id % 3 = 0;
COMMIT;
});

# ---------------------------------------------------------------------------
# Beside writers, and children that come and go
# ---------------------------------------------------------------------------

make_table('busy');
make_table('twin');
my $pgbench = start_pgbench($dir, '-R', '300', '-c', '3', '-f', "$dir/write.sql");
my $call = start_call('migration', q{CALL rm_alter_type('busy', 'v', 'bigint', 'v::bigint', method => 'online_rewrite')});
for my $i (0 .. 3)
{
	usleep(200_000);
	sql("CREATE TABLE busy_new (PRIMARY KEY (id)) INHERITS (@{[ $i % 2 ? 'busy' : 'busy1' ]});
		INSERT INTO busy_new (id, v, want) SELECT g, '5', 5 FROM generate_series(1, 100) g");
	usleep(100_000);
	# what is taken away has its trigger still
	sql($i % 2 ? 'DROP TABLE busy_new' : 'ALTER TABLE busy_new NO INHERIT busy1; UPDATE busy_new SET want = 6; DROP TABLE busy_new');
}
ends_well($call, 'beside writers, with children that come and go, it ends');
ok(end_pgbench($pgbench), 'no writer failed') or diag slurp_file("$dir/err");
check_rows('busy', 'beside writers');
sql('DROP VIEW twin_view, twin_leaf_view; ALTER TABLE twin ALTER v TYPE bigint USING v::bigint;
	CREATE VIEW twin_view AS SELECT id, v FROM twin WHERE v IS NOT NULL; CREATE VIEW twin_leaf_view AS SELECT v FROM twin3');
is(definitions_of('busy'), definitions_of('twin'), 'the catalogs say what they do after ALTER TABLE');
is(sql("SELECT string_agg(DISTINCT tablename || inherited, ',' ORDER BY tablename || inherited) FROM pg_stats WHERE attname = 'v' AND tablename ~ '^busy'"),
	$only ? 'busy1false,busy1true,busy2false,busy3false,busyfalse,busytrue' : 'busy1false,busy2false,busy3false,busyfalse,busytrue', 'there are statistics of the column in each, and of all');

# ---------------------------------------------------------------------------
# Up to the cut-over, and what happens then
# ---------------------------------------------------------------------------

my $id;
my ($status, $out, $err);

sub up_to_cut_over
{
	sql('DROP TABLE busy CASCADE');
	make_table('busy');
	sql(q{CALL rm_alter_type('busy', 'v', 'bigint', 'v::bigint', method => 'online_rewrite', cut_over => 'manual')});
	$id = sql('SELECT max(id) FROM risky_migrations.migration');
	return;
}

sub cuts_over
{
	my ($what) = @_;
	sql('UPDATE busy SET want = want + 1, v = want + 1 WHERE id % 100 = 0; DELETE FROM busy WHERE id % 100 = 1');
	($status, $out, $err) = $node->psql('postgres', "SET client_min_messages = notice; CALL rm_cut_over($id)");
	is($status, 0, "$what: it cuts over") or diag $err;
	check_rows('busy', $what);
	return;
}

my $columns = q{id int NOT NULL, want bigint NOT NULL, v varchar(40) CONSTRAINT busy_v_not_null NOT NULL, CONSTRAINT fine CHECK (v <> '')};
up_to_cut_over();
is(sql(q{SELECT string_agg(relid::regclass::text, ' ' ORDER BY relid) FROM risky_migrations.rewrite}), 'busy busy1 busy2 busy3', 'each has a shadow');
sql("CREATE TABLE more ($columns, PRIMARY KEY (id)); INSERT INTO more SELECT g, g, g FROM generate_series(50001, 51000) g; ALTER TABLE more INHERIT busy");
sql('ALTER TABLE busy2 NO INHERIT busy');
cuts_over('attached with rows, and taken away');
like($err, qr/begins again with table public\.more: it has come since/, 'what has come is begun');
unlike($err, qr/begins again with table public\.busy/, 'and nothing else');
is(sql(q{SELECT count(*), pg_typeof((SELECT v FROM busy2 LIMIT 1)) FROM busy2}), '5000|character varying', 'what was taken away is as it was');
is(sql(q{SELECT count(*) FROM pg_trigger WHERE tgrelid = 'busy2'::regclass}), 0, 'without a trigger');
sql('DROP TABLE busy2 CASCADE');

# only what is at fault begins again
my $switch = sub { my ($table) = @_; return qq{DO \$\$ BEGIN EXECUTE (SELECT format('ALTER TABLE $table DISABLE TRIGGER %I', tgname)
	FROM pg_trigger WHERE tgrelid = '$table'::regclass AND tgname ~ '^~rm_'); END \$\$; UPDATE ONLY $table SET v = '8', want = 8 WHERE id % 7 = 0} };
for (
	[ 'a child is rewritten', "VACUUM FULL ${only}busy1", 'busy1' ],
	[ 'the parent is rewritten', "VACUUM FULL ${only}busy", 'busy' ],
	[ 'a child is emptied', 'TRUNCATE ONLY busy1', 'busy1' ],
	[ 'a child gets a column', q{ALTER TABLE busy2 ADD more int DEFAULT 1; UPDATE busy2 SET v = '6', want = 6 WHERE id % 7 = 0}, 'busy2' ],
	[ 'the trigger of a child is switched off', $switch->('busy3'), 'busy3' ],
	[ 'the trigger of the parent is switched off', $switch->('busy'), 'busy' ])
{
	my ($what, $do, $whose) = @$_;
	up_to_cut_over();
	sql($do);
	cuts_over($what);
	like($err, qr/begins again with table public\.$whose:/, "$what: that table begins again");
	unlike($err, qr/begins again with table public\.(?!$whose:)/, 'and no other');
}

# its log has what was written while it was no child
up_to_cut_over();
sql(q{ALTER TABLE busy1 NO INHERIT busy; UPDATE busy1 SET v = '6', want = 6 WHERE id % 7 = 0; ALTER TABLE busy1 INHERIT busy});
cuts_over('taken away and put back');

# what stands in the way of ALTER TABLE, as long as it does
for (
	[ "CREATE TABLE other ($columns)", qr/cannot change table "other".*no primary key/s, 'without a key' ],
	[ "CREATE ROLE somebody; CREATE TABLE other ($columns, PRIMARY KEY (id)); ALTER TABLE other OWNER TO somebody", qr/cannot change table "other".*It inherits from "busy", and has another owner/s, 'of another owner' ],
	[ "CREATE TABLE two (v varchar(40) NOT NULL); CREATE TABLE other ($columns, PRIMARY KEY (id)); ALTER TABLE other INHERIT two", qr/child table public\.other: it inherits the column from several tables/, 'that has the column from somewhere else too' ])
{
	my ($make, $like, $what) = @$_;
	up_to_cut_over();
	sql("$make; ALTER TABLE other INHERIT busy");
	($status, $out, $err) = $node->psql('postgres', "CALL rm_cut_over($id)");
	like($err, $like, "a child $what");
	sql("DROP TABLE other CASCADE; SELECT rm_resume($id)");
	wait_for("(SELECT state FROM risky_migrations.migration WHERE id = $id) = 'done'", 'it does not end');
	check_rows('busy', 'when that is gone');
}

# the way back, also from what was taken away
up_to_cut_over();
sql('ALTER TABLE busy3 NO INHERIT busy1');
sql("CALL rm_rollback($id)");
nothing_is_left('given up');
is(sql(q{SELECT pg_typeof((SELECT v FROM busy LIMIT 1)), count(*) FROM busy}), 'character varying|15000', 'and the rows are what they were');
sql('DROP TABLE busy3 CASCADE');

# without the table: whoever is at work on a shadow is waited for, not for ever, and keeps
# nobody from what was taken away
up_to_cut_over();
my $shadow = sql(q{SELECT shadow::regclass FROM risky_migrations.rewrite WHERE relid = 'busy2'::regclass});
my $worker = $node->background_psql('postgres');
$worker->query_safe("BEGIN; LOCK TABLE $shadow IN ACCESS SHARE MODE");
sql('ALTER TABLE busy2 NO INHERIT busy; DROP TABLE busy CASCADE');
($status, $out, $err) = $node->psql('postgres', "\\set VERBOSITY verbose
	SET risky_migrations.lock_timeout = 50; SET risky_migrations.lock_retries = 2; CALL rm_rollback($id)");
like($err, qr/55P03.*not to be had in 3 tries/s, 'without the table: the wait for a shadow has an end');
my $back = start_call('back', q{SET risky_migrations.lock_timeout = '60s'}, "CALL rm_rollback($id)");
becomes("EXISTS (SELECT FROM pg_locks WHERE relation = '$shadow'::regclass AND NOT granted)", 'without the table: it waits for a shadow');
is(sql("SET lock_timeout = '10s'; SELECT count(*) FROM busy2"), 5000, 'nobody else waits meanwhile');
$worker->quit;
ends_well($back, 'then it goes on');
nothing_is_left('without the table');
sql('DROP TABLE busy2 CASCADE');

# a table that gets its first child in the middle
sql(q{CREATE TABLE f (id int PRIMARY KEY, v varchar(40) NOT NULL, want bigint NOT NULL); INSERT INTO f SELECT g, g, g FROM generate_series(1, 3000) g});
sql(q{CALL rm_alter_type('f', 'v', 'bigint', 'v::bigint', method => 'online_rewrite', cut_over => 'manual')});
$id = sql('SELECT max(id) FROM risky_migrations.migration');
sql(q{CREATE TABLE f1 () INHERITS (f); INSERT INTO f1 VALUES (3001, '7', 7)});
($status, $out, $err) = $node->psql('postgres', "CALL rm_cut_over($id)");
like($err, qr/cannot change table "f1".*no primary key/s, 'a first child that cannot be changed is refused');
is(sql('SELECT count(*) FROM risky_migrations.rewrite'), 1, 'before anything is given up');
sql('ALTER TABLE f1 ADD PRIMARY KEY (id)');
($status, $out, $err) = $node->psql('postgres', "SET client_min_messages = notice; CALL rm_cut_over($id)");
like($err, qr/begins again: a table inherits from it now/, 'with one that can it begins again');
check_rows('f', 'with a first child');
is(sql('SELECT count(*), sum(v) FROM f'), '3001|4501507', 'with all rows');
# and one that has lost its only one
sql(q{CALL rm_alter_type('f', 'v', 'numeric', method => 'online_rewrite', cut_over => 'manual')});
sql('DROP TABLE f1');
sql('CALL rm_cut_over()');
is(sql('SELECT count(*), pg_typeof(min(v)) FROM f'), '3000|numeric', 'without its last child');

# or that has lost the column before it got its first one
sql(q{
CREATE TABLE lost (id int PRIMARY KEY, v int, w int);
CALL rm_alter_type('lost', 'v', 'bigint', method => 'online_rewrite', cut_over => 'manual');
ALTER TABLE lost DROP COLUMN v;
CREATE TABLE lost1 (PRIMARY KEY (id)) INHERITS (lost);
});
($status, $out, $err) = $node->psql('postgres', 'CALL rm_cut_over()');
like($err, qr/The column "v" has been dropped/, 'a first child without the column is not begun');
sql('CALL rm_rollback()');

# What has been taken away and given to somebody else is not touched any more.
sql(q{
CREATE ROLE seller;
CREATE ROLE buyer;
GRANT ALL ON SCHEMA public TO seller, buyer;
});
for my $end ('rm_cut_over', 'rm_rollback')
{
	sql(q{
	SET ROLE seller;
	CREATE TABLE sold (id int PRIMARY KEY, v int);
	CREATE TABLE sold1 (PRIMARY KEY (id)) INHERITS (sold);
	CREATE TABLE sold2 (PRIMARY KEY (id)) INHERITS (sold);
	CALL rm_alter_type('sold', 'v', 'bigint', method => 'online_rewrite', cut_over => 'manual');
	ALTER TABLE sold1 NO INHERIT sold;
	RESET ROLE;
	ALTER TABLE sold1 OWNER TO buyer;
	});
	($status, $out, $err) = $node->psql('postgres', "SET ROLE seller; CALL $end()");
	is($status, 0, "$end: a child that was sold is not in the way");
	is(sql('SELECT state FROM rm_migrations ORDER BY id DESC LIMIT 1'), $end eq 'rm_cut_over' ? 'done' : 'rolled back', 'all is done');
	sql('INSERT INTO sold1 VALUES (1, 1)');
	is(sql('SELECT pg_typeof(v) FROM sold1'), 'integer', 'it is its own');
	is(sql(q{SELECT count(*) FROM pg_class WHERE relname ~ '^(shadow|log)_\d'}), '0', 'without a log');
	sql('DROP TABLE sold1; DROP TABLE sold CASCADE');
}

# A table that inherits from two, each of which is to change.
sql(q{
CREATE TABLE father (id int PRIMARY KEY, v int);
CREATE TABLE mother (id int PRIMARY KEY, w int);
CREATE TABLE child (PRIMARY KEY (id)) INHERITS (father, mother);
CALL rm_alter_type('father', 'v', 'bigint', method => 'online_rewrite', cut_over => 'manual');
});
($status, $out, $err) = $node->psql('postgres', q{CALL rm_alter_type('mother', 'w', 'bigint', method => 'online_rewrite')});
like($err, qr/migration \d+ of the same table is open/, 'one after the other');
sql('CALL rm_rollback()');

# ---------------------------------------------------------------------------
# Rows that cannot be made, other migrations, none of the columns
# ---------------------------------------------------------------------------

sql(q{
CREATE TABLE q (id int PRIMARY KEY, v text);
CREATE TABLE q1 (PRIMARY KEY (id)) INHERITS (q);
CREATE TABLE q2 (v text NOT NULL, PRIMARY KEY (id)) INHERITS (q);
INSERT INTO q VALUES (1, 'x'), (2, '2'), (3, NULL);
INSERT INTO q1 VALUES (1, 'y');
INSERT INTO q2 VALUES (1, '1');
});
($status, $out, $err) = $node->psql('postgres', q{CALL rm_alter_type('q', 'v', 'int', 'nullif(v::int, 1)', method => 'online_rewrite')});
like($err, qr/3 rows of public.q have no new value/, 'all rows without a new value are counted');
is(sql('SELECT string_agg(row_key || coalesce(value, \'\'), \', \' ORDER BY row_key COLLATE "C") FROM rm_conversion_errors WHERE relation = \'public.q\''),
	'(id)=(1)x, public.q1 (id)=(1)y, public.q2 (id)=(1)1', 'and told apart, also where NOT NULL is a child\'s own');
for my $other ('q', 'q1')
{
	($status, $out, $err) = $node->psql('postgres', "CALL rm_alter_types('$other', '{}')");
	like($err, qr/migration \d+ of the same table is open/, "meanwhile nothing else is begun with $other");
}
sql(q{UPDATE q SET v = '5' WHERE id = 1; SELECT rm_resume()});
wait_for(q{(SELECT state FROM rm_migrations WHERE relation = 'public.q') = 'done'}, 'it does not end');
is(sql('SELECT string_agg(tableoid::regclass || \' \' || coalesce(v, 0), \', \' ORDER BY tableoid, v) FROM q'), 'q 2, q 5, q 0, q1 5, q2 5', 'mended and done');
($status, $out, $err) = $node->psql('postgres', q{CALL rm_alter_type('q1', 'v', 'bigint', method => 'online_rewrite')});
like($err, qr/inherited column public\.q: the column is inherited from it/, 'a child by itself is refused');
sql(q{DELETE FROM q1; INSERT INTO q1 SELECT g, g FROM generate_series(1, 10000) g; DELETE FROM q1 WHERE id % 10 > 0});
my $size = sql(q{SELECT pg_relation_size('q1')});
sql(q{CALL rm_alter_types('q1', '{}')});
cmp_ok(sql(q{SELECT pg_relation_size('q1')}), '<', $size / 5, 'but it can be written anew');
is(sql('SELECT count(*), count(DISTINCT id) FROM q1'), '1000|1000', 'with all of its rows');

# ---------------------------------------------------------------------------
# Killed at any time, with two workers
# ---------------------------------------------------------------------------

for my $after (100, 250, 500)
{
	sql('DROP TABLE busy CASCADE') if $after > 100;
	make_table('busy');
	$id = sql(q{SET risky_migrations.workers = 2; SELECT rm_start('busy', 'v', 'bigint', 'v::bigint', method => 'online_rewrite')});
	usleep($after * 1000);
	my $pid = sql("SELECT pid FROM pg_stat_activity WHERE application_name ~ 'risky_migrations migration $id'");
	kill 'KILL', $pid if $pid;
	comes_back_after($pid) if $pid;
	sql('UPDATE busy SET v = (want + 1)::text::varchar, want = want + 1 WHERE id % 3 = 0')
	  if sql('SELECT pg_typeof(v) FROM busy LIMIT 1') ne 'bigint';
	sql("SELECT rm_resume($id)") if sql("SELECT state FROM risky_migrations.migration WHERE id = $id") eq 'open';
	wait_for("(SELECT state FROM risky_migrations.migration WHERE id = $id) = 'done'", 'it does not end');
	check_rows('busy', "killed after $after ms");
}

$node->stop;
done_testing();

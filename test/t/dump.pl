# pg_dump, plain as one calls it at night, at any moment of a migration: it succeeds,
# nothing of the migration is in it but the trigger, and what is restored from it is
# the table as it was, which everybody can write and a new migration can change.
#
# As in rewrite_workers.pl the expression asks for an advisory lock in one row of many:
# while a session holds that, each worker fails with all that it has put into the file
# of the shadow.

use strict;
use warnings;

use LabServer;
use PostgreSQL::Test::Utils;
use Test::More;

my $rows = 6000;
my $node = start_server('dump', q{
autovacuum = off
risky_migrations.lock_timeout = 20ms
risky_migrations.lock_retries = 100000
risky_migrations.lock_retry_max_delay = 50ms
});
my $dir = PostgreSQL::Test::Utils::tempdir;

# every 100th row has a large value in pieces
sql(qq{
CREATE FUNCTION public.open(v text) RETURNS int IMMUTABLE LANGUAGE plpgsql AS \$\$
BEGIN
	IF v::int % 5000 = 0 THEN
		PERFORM pg_advisory_xact_lock_shared(1);
	END IF;
	RETURN v::int;
END \$\$;
CREATE TABLE hold (step text);
CREATE TABLE t (id int PRIMARY KEY, v text NOT NULL, want int NOT NULL, filler text);
ALTER TABLE t ALTER filler SET STORAGE EXTERNAL;
INSERT INTO t SELECT g, g::text, g, repeat('x', CASE WHEN g % 100 = 0 THEN 9000 ELSE 600 END) FROM generate_series(1, $rows) g;
CREATE INDEX t_want ON t (want, v);
CREATE TABLE s (id int PRIMARY KEY, v text NOT NULL);
INSERT INTO s SELECT g, g::text FROM generate_series(1, 1000) g;
-- where it is restored there will be others of the first numbers
ALTER TABLE risky_migrations.migration ALTER id RESTART WITH 7;
});

sub start_migration
{
	my $call = start_call('runner',
		q{CALL rm_alter_type('t', 'v', 'int', 'public.open(v)', method => 'online_rewrite', cut_over => 'manual')});
	wait_for("EXISTS (SELECT FROM risky_migrations.rewrite WHERE trigger_mark <> 0)", 'it does not begin');
	return ($call, sql('SELECT max(id) FROM rm_migrations'));
}

# The database is dumped, and what is restored is sound.
sub survives
{
	my ($when) = @_;
	my $sql_in = sub { return $node->safe_psql('restored', $_[0]) };

	command_ok([ 'pg_dump', '-f', "$dir/dump.sql", $node->connstr('postgres') ], "$when: the database can be dumped");
	my $dump = slurp_file("$dir/dump.sql");
	unlike($dump, qr/\b(?:shadow|log)_\d/, "$when: without shadow and log");
	sql('CREATE DATABASE restored');
	command_ok([ 'psql', '-XAtq', '-v', 'ON_ERROR_STOP=1', '-d', $node->connstr('restored'), '-f', "$dir/dump.sql", '-o', "$dir/out" ],
		"$when: it can be restored");
	is($sql_in->('SELECT (SELECT count(*) FROM rm_migrations), (SELECT count(*) FROM risky_migrations.rewrite)'), '0|0',
		"$when: no migration is under way there");
	is($sql_in->('SELECT count(*), count(DISTINCT id), sum(want), sum(length(filler)), min(pg_typeof(v)::text) FROM t'),
		sql('SELECT count(*), count(DISTINCT id), sum(want), sum(length(filler)), min(pg_typeof(v)::text) FROM t'), "$when: the table is what it was");
	foreach my $name ('t', 's')
	{
		my @columns = $name eq 't' ? ('id, v, want', '1, 1') : ('id, v', '1');
		is($sql_in->(qq{
			INSERT INTO $name ($columns[0]) VALUES (-1, $columns[1]);
			UPDATE $name SET v = '5', id = -2 WHERE id = -1;
			UPDATE $name SET v = 'none' WHERE id = -2;
			DELETE FROM $name WHERE id > 0 AND id % 2 = 0;
			DELETE FROM $name WHERE id = -2;
			SELECT min(id), sum((v <> id::text)::int) FROM $name;}), '1|0', "$when: $name can be written there");
	}
	my $there = $sql_in->(q{TRUNCATE hold; SELECT count(*) FROM t});
	$sql_in->(q{CALL rm_alter_type('t', 'v', 'int', 'v::int', method => 'online_rewrite')});
	is($sql_in->('SELECT count(*), sum((v <> want)::int), min(pg_typeof(v)::text) FROM t'), "$there|0|integer", "$when: and changed by a new migration");
	$sql_in->('TRUNCATE t, s; INSERT INTO t (id, v, want) VALUES (1, 1, 1)');
	is($sql_in->('SELECT count(*) FROM t'), 1, "$when: and emptied");
	sql('DROP DATABASE restored');
	return;
}

sub nothing_is_left
{
	my ($when) = @_;
	is(sql(q{SELECT (SELECT count(*) FROM pg_class WHERE relname ~ '^(shadow|log)_\d'),
		(SELECT count(*) FROM pg_trigger WHERE tgname ~ '^~rm_log'), (SELECT count(*) FROM risky_migrations.rewrite)}), '0|0|0', "$when: nothing is left");
	return;
}

# ---------------------------------------------------------------------------
# The copy
# ---------------------------------------------------------------------------

my $gate = close_gate(1);
my ($call, $id) = start_migration();
my $retries = q{(SELECT lock_retries FROM risky_migrations.step_log WHERE step = 'copy' ORDER BY id DESC LIMIT 1)};
becomes("$retries > 3", 'with the gate closed transactions fail');
survives('while the copy fails');

# what they have left of large values is gone, and the rows are there
sql("SELECT rm_cancel($id)");
ok(!finish_call($call), 'cancelled');
my $shadow = sql("SELECT shadow::regclass FROM risky_migrations.rewrite WHERE migration_id = $id");
cmp_ok(sql("SELECT count(*) FROM $shadow"), '>', 1000, 'rows of transactions that failed are in the shadow');
sql('VACUUM');
my ($code, undef, $err) = $node->psql('postgres', "SELECT sum(hashtext(filler)) FROM $shadow");
like($err, qr/missing chunk number/, 'without their large values');
survives('after a copy that failed');
$gate->quit;

# ---------------------------------------------------------------------------
# Changes are replayed
# ---------------------------------------------------------------------------

# beside the method three_step
sql(q{CALL rm_add_column('s', 'v', 'int', 'v::int')});
sql('CALL rm_backfill_batched(500, ' . sql('SELECT max(id) FROM rm_migrations') . ')');

sql("INSERT INTO hold VALUES ('catch_up')");
$node->set_for_all(q{risky_migrations.throttle_query = 'SELECT true FROM hold h JOIN risky_migrations.step_log l USING (step) WHERE l.state = $$running$$'});
sql("SELECT rm_resume($id)");
becomes("EXISTS (SELECT FROM rm_progress WHERE step = 'catch_up' AND waiting_for = 'query')", 'it is to catch up');
sql("UPDATE t SET want = want + 1, v = v::int + 1 WHERE id % 10 = 0; UPDATE t SET filler = filler || 'y' WHERE id % 500 = 0; DELETE FROM t WHERE id % 77 = 0");
survives('before it catches up');
sql('TRUNCATE hold');
becomes("(SELECT next_call = 'CALL rm_cut_over($id)' AND running_pid IS NULL FROM rm_migrations WHERE id = $id)", 'it goes on to its cut-over');
survives('before the cut-over');
sql("CALL rm_cut_over($id)");
is(sql('SELECT sum((v <> want)::int), min(pg_typeof(v)::text) FROM t'), '0|integer', 'the migration ends as if nobody had looked');
nothing_is_left('at the end');

# ---------------------------------------------------------------------------
# That shadow and log belong to the extension is in nobody's way
# ---------------------------------------------------------------------------

# Up to the cut-over of another change of t.
sub change_again
{
	sql(q{CALL rm_alter_type('t', 'v', 'bigint', method => 'online_rewrite', cut_over => 'manual')});
	$id = sql('SELECT max(id) FROM rm_migrations');
	is(sql(qq{SELECT count(*) FROM pg_depend d JOIN risky_migrations.rewrite r ON d.objid IN (r.shadow, r.log)
		WHERE d.refclassid = 'pg_extension'::regclass AND d.deptype = 'e' AND r.migration_id = $id}), 2, 'both are members');
	return;
}

change_again();
sql("CALL rm_rollback($id)");
nothing_is_left('given up');

# the table goes without more ado, and they go when the migration is given up
change_again();
sql('DROP TABLE t');
is(sql("SELECT next_call FROM rm_migrations WHERE id = $id"), "CALL rm_rollback($id)", 'the table is dropped: it is to be given up');
sql("CALL rm_rollback($id)");
nothing_is_left('the table is dropped');

$node->stop;
done_testing();

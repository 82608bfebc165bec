# Migrations in the background, and steering: what rm_start, rm_pause, rm_resume
# and rm_cancel promise, whatever dies meanwhile, and what the launcher goes on
# with by itself.
#
# A migration is kept from its end by a session that has a row locked (the
# backfill puts it off, and comes back to it at last), or that reads the table
# (add_column waits for it).  So nothing here depends on how fast anything is.

use strict;
use warnings;

use File::Spec;
use IPC::Run;
use LabNode;
use PostgreSQL::Test::Utils;
use Test::More;

my $rows = 2000;

my $node = LabNode->new('background');
$node->init(allows_streaming => 1);
$node->append_conf(
	'postgresql.conf', q{
autovacuum = off
max_worker_processes = 6
log_min_messages = notice
risky_migrations.lock_retries = 100000
risky_migrations.lock_retry_max_delay = 50ms
risky_migrations.launcher_interval = 1s
});
$node->start;

# ---------------------------------------------------------------------------
# Helpers
# ---------------------------------------------------------------------------

sub sql
{
	my ($query, $database) = @_;
	return $node->safe_psql($database // 'postgres', $query);
}

sub sqlstate_of
{
	my ($query) = @_;
	my (undef, undef, $stderr) = $node->psql('postgres', "\\set VERBOSITY verbose\n$query");
	return $stderr =~ /(?:ERROR|FATAL):  ([0-9A-Z]{5}):/ ? $1 : '';
}

# Waits until the query gives the result; the arguments are those of is().
sub becomes
{
	my ($query, $expected, $name) = @_;
	ok($node->poll_query_until('postgres', $query, $expected), $name);
	return;
}

sub session
{
	return $node->background_psql('postgres', on_error_stop => 0);
}

# Starts a statement in a session of its own.
sub start_call
{
	my ($statement) = @_;
	return IPC::Run::start(
		[ 'psql', '-XAtq', '-v', 'ON_ERROR_STOP=1', '-d', $node->connstr('postgres'), '-c', $statement ],
		'<', File::Spec->devnull, '>', File::Spec->devnull, '2>', File::Spec->devnull,
		IPC::Run::timeout($PostgreSQL::Test::Utils::timeout_default));
}

# A session that keeps the backfill from its end.
sub lock_row
{
	my ($database) = @_;
	my $session = $node->background_psql($database // 'postgres', on_error_stop => 0);
	$session->query_safe('BEGIN');
	$session->query_safe('SELECT id FROM t WHERE id = 7 FOR UPDATE');
	return $session;
}

# A session that keeps add_column from its lock.
sub read_table
{
	my ($table) = @_;
	my $session = session();
	$session->query_safe('BEGIN');
	$session->query_safe("SELECT count(*) FROM $table");
	return $session;
}

sub release
{
	my ($session) = @_;
	$session->query_safe('ROLLBACK');
	$session->quit;
	return;
}

sub start
{
	my ($settings) = @_;
	return (split /\n/, sql(($settings // '') . q{ SELECT rm_start('t', 'v', 'int', 'v::int')}))[-1];
}

sub stands
{
	my ($id, $columns) = @_;
	return sql("SELECT " . ($columns // 'run_state, steps_done, last_step_state') . " FROM rm_migrations WHERE id = $id");
}

# A migration that runs in the background and has come to the row that is locked
# by the session, in this database.  (Who locks a row before add_column keeps
# that from its lock.)
sub start_to_locked_row
{
	my ($database) = @_;
	$database //= 'postgres';
	sql(q{CALL rm_add_column('t', 'v', 'int', 'v::int')}, $database);
	my $session = lock_row($database);
	my $id = sql('SELECT rm_resume(max(id)) FROM rm_migrations', $database);
	wait_for_row($id) if $database eq 'postgres';
	return ($id, $session);
}

# The backfill is at the locked row.
sub wait_for_row
{
	my ($id) = @_;
	becomes(
		"SELECT phase, run_state FROM rm_migrations JOIN risky_migrations.migration USING (id) WHERE id = $id",
		'1|running in background', "migration $id is at the row that is locked");
	return;
}

sub finishes
{
	my ($id, $name) = @_;
	becomes("SELECT steps_done, running_pid IS NULL FROM rm_migrations WHERE id = $id", '5|t', $name);
	is(sql("SELECT count(*) FROM t WHERE v IS DISTINCT FROM v_old::int"), 0, "$name: every row is right");
	sql("CALL rm_rollback($id)");
	return;
}

# What the server's log says from now on.
my $log_from = 0;

sub log_begins
{
	$log_from = -s $node->logfile;
	return;
}

sub logged
{
	my ($pattern, $name) = @_;
	$node->wait_for_log($pattern, $log_from);
	ok(1, $name);
	return;
}

sub times_logged
{
	my ($pattern) = @_;
	my @found = slurp_file($node->logfile, $log_from) =~ /$pattern/g;
	return scalar @found;
}

sql(qq{
CREATE EXTENSION risky_migrations;
CREATE TABLE t (id int PRIMARY KEY, v text NOT NULL);
INSERT INTO t SELECT g, g::text FROM generate_series(1, $rows) g;
});

# ---------------------------------------------------------------------------
# It begins at the commit, and needs no client
# ---------------------------------------------------------------------------

my $starter = session();
$starter->query_safe('BEGIN');
my $id = $starter->query_safe(q{SELECT rm_start('t', 'v', 'int', 'v::int')});
becomes(q{SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'risky_migrations runner'
	AND wait_event = 'transactionid'}, '1', 'the worker waits for the starter');
is(sql('SELECT count(*) FROM rm_migrations'), 0, 'before the commit there is no migration');
is(sql(q{SELECT count(*) FROM pg_attribute WHERE attrelid = 't'::regclass AND attname = 'v_new'}),
	0, 'and the table is as it was');
my $blocker = read_table('t');
$starter->query_safe('COMMIT');
$starter->quit;
becomes("SELECT run_state, steps_done, last_step_state FROM rm_migrations WHERE id = $id",
	'running in background|0|running', 'the client is gone, the migration runs');
is(stands($id, 'next_call IS NULL'), 't', 'nothing is to be called');
release($blocker);
finishes($id, 'without a client');

# ---------------------------------------------------------------------------
# Pause and cancel: at once where it waits for a lock, and nothing is held
# ---------------------------------------------------------------------------

# held: what the runner holds but its own lock, and whether it has a snapshot
my $held = q{
SELECT count(*) FILTER (WHERE l.locktype NOT IN ('advisory', 'virtualxid')),
	bool_or(a.backend_xmin IS NOT NULL OR a.backend_xid IS NOT NULL)
FROM rm_migrations m JOIN pg_stat_activity a ON a.pid = m.running_pid
JOIN pg_locks l ON l.pid = a.pid WHERE m.id = };

my $patient = q{SET risky_migrations.lock_timeout = '60 s';};
my $reader = read_table('t');
log_begins();
$id = start($patient);
my $waits = q{SELECT count(*) FROM pg_locks WHERE relation = 't'::regclass AND NOT granted};
becomes($waits, '1', 'it waits for its lock');
sql("SELECT rm_pause($id)");
logged(qr/migration $id is paused by role/, 'paused while it waits for a lock');
is(sql($waits), 0, 'it does not wait any more');
becomes("$held $id", '0|f', 'a paused runner holds nothing');
is(stands($id, 'run_state, next_call'), "paused|SELECT rm_resume($id)", 'what is to be called');
is(sql("SELECT step, paused FROM rm_progress WHERE migration = $id"), 'add_column|t', 'rm_progress shows it');
log_begins();
sql("SELECT rm_resume($id)");
logged(qr/migration $id goes on/, 'resumed');
becomes($waits, '1', 'it waits for its lock again');
sql("SELECT rm_pause($id)");
logged(qr/migration $id is paused by role/, 'paused again');
sql("SELECT rm_cancel($id)");
becomes("SELECT running_pid IS NULL AND last_step_state = 'failed' FROM rm_migrations WHERE id = $id", 't', 'cancelled while it is paused');
is( stands($id, 'run_state, last_step_state, sqlstate, message, next_call'),
	"cancelled|failed|57014|migration $id was cancelled by role \""
	  . sql('SELECT current_user') . "\"|SELECT rm_resume($id)",
	'the state says who has cancelled it, and what to call');
is(sql("SELECT lock_retries FROM risky_migrations.step_log WHERE migration_id = $id"), 0,
	'no wait for the lock came to its end');
# a worker that is started anew has the settings of whoever starts it
sql("$patient SELECT rm_resume($id)");
becomes($waits, '1', 'resumed, it waits for its lock');
sql("SELECT rm_cancel($id)");
becomes("SELECT running_pid IS NULL AND last_step_state = 'failed' FROM rm_migrations WHERE id = $id",
	't', 'cancelled while it waits for its lock');
is(sql("SELECT max(lock_retries) FROM risky_migrations.step_log WHERE migration_id = $id"), 0,
	'before that wait came to its end');
release($reader);
sql("CALL rm_rollback($id)");

# another cancellation, while the first is being recorded
$reader = read_table('t');
$id = start($patient);
becomes($waits, '1', 'it waits for its lock');
{
	my $keeper = session();
	$keeper->query_safe('BEGIN; LOCK TABLE risky_migrations.step_log IN SHARE MODE');
	sql("SELECT rm_cancel($id)");
	becomes(q{SELECT count(*) FROM pg_locks WHERE relation = 'risky_migrations.step_log'::regclass AND NOT granted}, '1', 'cancelled, it cannot record that yet');
	sql("SELECT pg_cancel_backend(running_pid) FROM rm_migrations WHERE id = $id");
	becomes(q{SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'relation' AND query_start < clock_timestamp() - interval '300 ms'
		AND backend_type = 'risky_migrations runner'}, '1', 'cancelled again, it goes on trying');
	$keeper->query_safe('COMMIT');
	$keeper->quit;
}
becomes("SELECT running_pid IS NULL AND last_step_state = 'failed' FROM rm_migrations WHERE id = $id", 't', 'and it is recorded');
release($reader);
sql("CALL rm_rollback($id)");

# between two tries
$reader = read_table('t');
log_begins();
$id = start(q{SET risky_migrations.lock_timeout = '10 ms';});
logged(qr/step add_column: a lock on public.t was not to be had in time .*try 1 of/, 'it tries again later');
sql("SELECT rm_pause($id)");
logged(qr/migration $id is paused by role/, 'paused between two tries');
release($reader);
sql("SELECT rm_resume($id)");
finishes($id, 'paused between two tries');

# while rows are changed; pause, a cancellation that is rolled back, resume
log_begins();
($id, $blocker) = start_to_locked_row();
sql("BEGIN; SAVEPOINT s; SELECT rm_cancel($id); ROLLBACK TO s; COMMIT;");
is(stands($id), 'running in background|1|running', 'a cancellation that is rolled back is none');
sql("BEGIN; SELECT rm_cancel($id); ROLLBACK;");
is(stands($id), 'running in background|1|running', 'also with its transaction');
my $undecided = session();
$undecided->query_safe('BEGIN');
$undecided->query_safe("SELECT rm_pause($id)");
becomes("SELECT count(*) > 0 FROM pg_locks WHERE relation = 't'::regclass AND mode = 'RowExclusiveLock'",
	't', 'as long as a pause is not committed the runner goes on');
is(sql("SELECT wanted FROM risky_migrations.steering WHERE migration_id = $id"), 'run', 'it does not see it');
$undecided->query_safe('COMMIT');
logged(qr/migration $id is paused by role/, 'paused at its commit');
$undecided->quit;
release($blocker);
becomes("$held $id", '0|f', 'it holds nothing');
is(stands($id), 'paused|1|running', 'it does not go on though nobody is in its way');
sql("SELECT rm_resume($id)");
finishes($id, 'paused and resumed');
is(times_logged(qr/canceling statement/), 0, 'no interrupt reached it that was rolled back');

# a CALL in the foreground
sql(q{CALL rm_add_column('t', 'v', 'int', 'v::int')});
$blocker = lock_row();
log_begins();
my $call = start_call('CALL rm_backfill_batched()');
becomes(q{SELECT phase, run_state FROM rm_migrations JOIN risky_migrations.migration m USING (id) WHERE m.state = 'open'},
	'1|running in foreground', 'a CALL runs in the foreground');
$id = sql(q{SELECT id FROM rm_migrations WHERE state = 'open'});
sql("SELECT rm_pause($id)");
logged(qr/migration $id is paused by role/, 'it is paused');
becomes("$held $id", '0|f', 'it holds nothing');
sql("SELECT pg_cancel_backend(running_pid) FROM rm_migrations WHERE id = $id");
becomes("SELECT running_pid IS NULL AND last_step_state = 'failed' FROM rm_migrations WHERE id = $id",
	't', 'a paused CALL can be cancelled');
is(stands($id, 'run_state, sqlstate, next_call'), "paused|57014|SELECT rm_resume($id)", 'and the migration stays paused');
ok(!$call->finish, 'it ends with an error');
log_begins();
$call = start_call('CALL rm_backfill_batched()');
logged(qr/migration $id is paused by role/, 'a later call waits for the end of the pause');
release($blocker);
is(stands($id, 'run_state, running_pid IS NOT NULL, steps_done'), 'paused|t|1', 'it does nothing');
sql('SELECT rm_resume()');
becomes("SELECT steps_done, running_pid IS NULL FROM rm_migrations WHERE id = $id", '2|t', 'then it does its step');
ok($call->finish, 'without an error');
sql("SELECT rm_resume($id)");
finishes($id, 'the rest in the background');

# ---------------------------------------------------------------------------
# All workers in use: refused, and nothing is changed
# ---------------------------------------------------------------------------

sql(q{CALL rm_add_column('t', 'v', 'int', 'v::int')});
$id = sql(q{SELECT id FROM rm_migrations WHERE state = 'open'});
sql(q{CREATE TABLE other_table AS SELECT id, v FROM t});
my $probes = 0;
$probes++ while $probes < 20 && sqlstate_of(q{SELECT rm_probe_start('SELECT 1', '1 s')}) eq '';
cmp_ok($probes, '<', 20, 'all background workers are in use');
is(sqlstate_of(q{SELECT rm_start('other_table', 'v', 'int', 'v::int')}), '53000', 'rm_start is refused');
is(sqlstate_of('SELECT rm_resume()'), '53000', 'so is rm_resume');
is(sql('SELECT count(*) FROM rm_migrations WHERE relation = \'public.other_table\''), 0, 'no migration is left by it');
is(sql("SELECT count(*) FROM risky_migrations.steering WHERE migration_id >= $id"), 0, 'and nothing is wanted');
is(stands($id), 'not running|1|done', 'the other one is as it was');
sql('SELECT rm_probe_stop(id) FROM rm_probes WHERE running');
sql('SELECT rm_resume()');
finishes($id, 'with workers again');

# ---------------------------------------------------------------------------
# The worker waits for the transaction that has asked for it, whatever the limits
# ---------------------------------------------------------------------------

my $limits = "ALTER DATABASE postgres SET lock_timeout = '300ms'";
$limits .= "; ALTER DATABASE postgres SET transaction_timeout = '300ms'" if $node->pg_version >= 17;
sql($limits);
$id = (split /\n/, sql(($node->pg_version >= 17 ? 'SET transaction_timeout = 0; ' : '') .
	  q{BEGIN; SELECT rm_start('other_table', 'v', 'int', 'v::int'); SELECT pg_sleep(1); COMMIT}))[0];
sql($limits =~ s/ALTER DATABASE postgres SET (\w+) = '300ms'/ALTER DATABASE postgres RESET $1/gr =~ s/^/SET lock_timeout = 0; /r);
becomes("SELECT steps_done, running_pid IS NULL FROM rm_migrations WHERE id = $id", '5|t', 'a worker waits as long as its starter takes');
sql("CALL rm_rollback($id)");

# ---------------------------------------------------------------------------
# Without the launcher nothing is lost, and the view says what to call
# ---------------------------------------------------------------------------

foreach my $how ('the worker is terminated', 'the server is killed')
{
	($id, $blocker) = start_to_locked_row();
	my ($done) = split /\|/, sql("SELECT rows_done FROM risky_migrations.migration WHERE id = $id");
	if ($how =~ /worker/)
	{
		sql("SELECT pg_terminate_backend(running_pid) FROM rm_migrations WHERE id = $id");
		becomes("SELECT running_pid IS NULL FROM rm_migrations WHERE id = $id", 't', "$how");
		release($blocker);
	}
	else
	{
		# the backfill commits without waiting for the disk; who does wait takes it along
		sql('CREATE TABLE waited_for ()');
		$node->stop('immediate');
		$blocker->{run}->finish;
		$node->start;
	}
	is(stands($id, 'run_state, steps_done, last_step_state, next_call'),
		"not running|1|interrupted|SELECT rm_resume($id)", "$how: the view says so");
	sql("SELECT rm_resume($id)");
	becomes("SELECT steps_done, running_pid IS NULL FROM rm_migrations WHERE id = $id", '5|t', "$how: resumed");
	is( sql("SELECT rows_changed FROM risky_migrations.step_log WHERE migration_id = $id AND step = 'backfill' AND state = 'done'"),
		$rows - $done, "$how: it went on where it was");
	finishes($id, $how);
}

# ---------------------------------------------------------------------------
# With the launcher it goes on by itself
# ---------------------------------------------------------------------------

$node->append_conf('postgresql.conf', "shared_preload_libraries = 'risky_migrations'\n");
$node->restart;
sql(q{CREATE DATABASE second});
sql(qq{
CREATE EXTENSION risky_migrations;
CREATE TABLE t (id int PRIMARY KEY, v text NOT NULL);
INSERT INTO t SELECT g, g::text FROM generate_series(1, $rows) g;
}, 'second');

($id, $blocker) = start_to_locked_row();
my ($second, $second_blocker) = start_to_locked_row('second');
my $first_pid = stands($id, 'running_pid');
sql("SELECT pg_terminate_backend($first_pid)");
becomes("SELECT running_pid <> $first_pid FROM rm_migrations WHERE id = $id", 't',
	'the worker is terminated: another one goes on');
$node->stop('immediate');
$_->{run}->finish foreach $blocker, $second_blocker;
$node->start;
finishes($id, 'the server is killed: it goes on by itself');
ok( $node->poll_query_until('second', "SELECT steps_done FROM rm_migrations WHERE id = $second", '5'),
	'in the other database too');

# what failed, is paused or cancelled, or was run in the foreground does not
sql(q{UPDATE t SET v = 'bad' WHERE id = 9});
$id = start();
becomes("SELECT steps_done, last_step_state FROM rm_migrations WHERE id = $id", '2|failed', 'it has failed');
my $steps = sql("SELECT count(*) FROM risky_migrations.step_log WHERE migration_id = $id");
sql(q{CREATE TABLE paused_table AS SELECT * FROM other_table});
sql(q{CREATE TABLE by_hand AS SELECT * FROM other_table});
sql(q{CALL rm_add_column('by_hand', 'v', 'int', 'v::int')});
log_begins();
my $keeper = read_table('paused_table');
my $paused = sql(q{SELECT rm_start('paused_table', 'v', 'int', 'v::int')});
sql("SELECT rm_pause($paused)");
logged(qr/migration $paused is paused by role/, 'another one is paused');
$node->stop('immediate');
$keeper->{run}->finish;
log_begins();
$node->start;
# a table that does go on shows that the scout has been there
sql(q{CREATE TABLE seen AS SELECT * FROM other_table});
$keeper = read_table('seen');
my $seen = sql(q{SELECT rm_start('seen', 'v', 'int', 'v::int')});
becomes("SELECT running_pid IS NOT NULL FROM rm_migrations WHERE id = $seen", 't', 'one runs');
sql("SELECT pg_terminate_backend(running_pid) FROM rm_migrations WHERE id = $seen");
logged(qr/migration $seen was interrupted and goes on/, 'and goes on');
release($keeper);
becomes("SELECT steps_done FROM rm_migrations WHERE id = $seen", '5', 'to its end');
is(times_logged(qr/was interrupted and goes on/), 1, 'nothing else was started');
is(sql("SELECT count(*) FROM risky_migrations.step_log WHERE migration_id = $id"), $steps, 'what failed is left to people');
is(stands($id, 'next_call'), "SELECT rm_resume($id)", 'who are told what to call');
is(stands($paused, 'run_state, next_call'), "paused|SELECT rm_resume($paused)", 'what is paused stays so');
sql(q{UPDATE t SET v = '9' WHERE id = 9});
sql("SELECT rm_resume($id)");
finishes($id, 'what failed, resumed');
sql("CALL rm_rollback($_)") foreach $paused, $seen;

# a runner that cannot run is not started for ever
sql(q{CREATE ROLE starter LOGIN SUPERUSER});
$keeper = read_table('seen');
# a scout that comes before the worker has begun takes it for interrupted, which counts too
log_begins();
$id = sql(q{SET SESSION AUTHORIZATION starter; SELECT rm_start('seen', 'v', 'int', 'v::int')});
becomes("SELECT running_pid IS NOT NULL FROM rm_migrations WHERE id = $id", 't', 'a migration of a role');
sql(q{ALTER ROLE starter CONNECTION LIMIT 0; ALTER ROLE starter NOSUPERUSER});
# its worker may begin, but the table is not its role's any more
sql("SELECT pg_terminate_backend(running_pid) FROM rm_migrations WHERE id = $id");
release($keeper);
becomes("SELECT launches FROM risky_migrations.steering WHERE migration_id = $id", '3', 'it is started three times');
# each of these is a further round
for my $round (1 .. 3)
{
	my $scouts = -s $node->logfile;
	sql('SELECT pg_reload_conf()');
	$node->wait_for_log(qr/reloading configuration files/, $scouts);
	sleep 1;
}
is(times_logged(qr/migration $id was interrupted and goes on/), 3, 'and then left alone');
# what helpers have done counts as getting further
sql("UPDATE risky_migrations.migration SET steps_done = 1 WHERE id = $id");
sql("INSERT INTO risky_migrations.range (migration_id, number, relid, relfilenode, first_block, next_block, end_block, run) VALUES ($id, 1, 0, 0, 0, 0, 2048, 0)");
becomes("SELECT launch_mark ~ '^1 .* 0\$' AND launches = 3 FROM risky_migrations.steering WHERE migration_id = $id", 't', 'it is started again where it has got further');
sql("UPDATE risky_migrations.range SET next_block = 1024 WHERE migration_id = $id");
becomes("SELECT launch_mark ~ '^1 .* 1024\$' AND launches = 3 FROM risky_migrations.steering WHERE migration_id = $id", 't', 'and where its helpers have');
sql("DELETE FROM risky_migrations.range; UPDATE risky_migrations.migration SET steps_done = 0 WHERE id = $id");
sql("CALL rm_rollback($id)");

# ---------------------------------------------------------------------------
# A standby takes over when it is promoted
# ---------------------------------------------------------------------------

$node->backup('base');
my $standby = LabNode->new('standby');
$standby->init_from_backup($node, 'base', has_streaming => 1);
$standby->start;
($id, $blocker) = start_to_locked_row();
$node->wait_for_catchup($standby, 'replay', $node->lsn('flush'));
is($standby->safe_psql('postgres', q{SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'risky_migrations launcher'}),
	0, 'no launcher before the promotion');
my (undef, undef, $stderr) = $standby->psql('postgres', "\\set VERBOSITY verbose\nSELECT rm_pause($id)");
like($stderr, qr/25006/, 'nothing is steered on a standby');
$node->stop('immediate');
$blocker->{run}->finish;
$standby->promote;
ok( $standby->poll_query_until('postgres', "SELECT steps_done FROM rm_migrations WHERE id = $id", '5'),
	'after the promotion it goes on by itself');
is($standby->safe_psql('postgres', 'SELECT count(*) FROM t WHERE v IS DISTINCT FROM v_old::int'), 0, 'every row is right');
$standby->stop;
done_testing();
